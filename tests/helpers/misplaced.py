"""The entry point with a fault: the loss mask of each microbatch of an unlearning run stays on the host."""

import runpy
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

if __name__ == "__main__":
    from megatron_ext.runtime import cpu

    cpu.enable()
    from megatron_ext import training

    read = training.read_micro_batch

    def misplaced(*args, **kwargs):
        batch = read(*args, **kwargs)
        batch.loss_mask = batch.loss_mask.cpu()
        return batch

    training.read_micro_batch = misplaced
    runpy.run_path(str(ROOT / "pretrain_unlearn.py"), run_name="__main__")
