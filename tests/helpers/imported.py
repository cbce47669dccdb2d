"""The entry point, and at its end what it has imported and started, as a line of JSON."""

import gc
import json
import runpy
import sys
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
NAMES = ("transformers", "torch._dynamo", "torch._inductor", "sentencepiece")

if __name__ == "__main__":
    runpy.run_path(str(ROOT / "pretrain_unlearn.py"), run_name="__main__")
    found = {
        "imported": [name for name in NAMES if name in sys.modules],
        "started": [child.cmdline() for child in psutil.Process().children()],
        "collects": gc.isenabled(),
        "frozen": gc.get_freeze_count(),
    }
    print(json.dumps(found))
