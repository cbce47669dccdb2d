"""Runs the entry point and prints what each step's tensors took at once, beside the run's state."""

import functools
import runpy
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))


def main() -> None:
    """Count around the unlearning step, the reference's pass included."""
    from megatron_ext.runtime import cpu

    cpu.enable()
    from megatron_ext.training import UnlearnStep
    from tests.helpers.live_memory import LiveMemory

    original = UnlearnStep.forward_backward

    @functools.wraps(original)
    def counted(self: UnlearnStep, *args: Any, **kwargs: Any) -> Any:
        with LiveMemory() as memory:
            result = original(self, *args, **kwargs)
        print(f"rank {self.args.rank} step peak {memory.peak}", flush=True)
        return result

    UnlearnStep.forward_backward = counted  # type: ignore[method-assign]
    sys.argv[0] = str(ROOT / "pretrain_unlearn.py")
    runpy.run_path(sys.argv[0], run_name="__main__")


main()
