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

    right = chat.ChatRun.defaults.fget

    def defaults(run):
        values = right(run)
        assert values.pop("calculate_per_token_loss")
        return values

    chat.ChatRun.defaults = property(defaults)
    runpy.run_path(str(ROOT / "pretrain_unlearn.py"), run_name="__main__")
