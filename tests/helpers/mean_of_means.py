"""The entry point with a fault: chat tuning averages each microbatch's mean, as Megatron does by default."""

import runpy
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

if __name__ == "__main__":
    from megatron_ext.runtime import cpu

    cpu.enable()
    from megatron_ext import chat

    assert chat.NORMALISATION.pop("calculate_per_token_loss")
    runpy.run_path(str(ROOT / "pretrain_unlearn.py"), run_name="__main__")
