"""Runs the entry point and prints what ranks wait for between a step's start and the student's first pass."""

import functools
import runpy
import sys
from pathlib import Path
from typing import Any

import torch
from torch.distributed import ProcessGroup
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))


class Waits(TorchDispatchMode):
    """Notes every operation of a process group, and of how many ranks that is."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()
        self.on = True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.on and func.namespace == "c10d":
            scripted = [one for one in args if isinstance(one, torch.ScriptObject)]
            groups = [
                ProcessGroup.unbox(one) for one in scripted if "ProcessGroup" in str(one._type())
            ]
            name = func.overloadpacket.__name__
            self.seen |= {f"{name}:{group.size()}" for group in groups[:1]}
        return func(*args, **kwargs or {})


def main() -> None:
    """Look at the unlearning step, the reference's pass included."""
    from megatron_ext.runtime import cpu

    cpu.enable()
    from megatron_ext.training import UnlearnStep

    whole, forward = UnlearnStep.forward_backward, UnlearnStep.forward_step
    now: list[Waits] = []

    @functools.wraps(whole)
    def watched(self: UnlearnStep, *args: Any, **kwargs: Any) -> Any:
        with Waits() as waits:
            now[:] = [waits]
            result = whole(self, *args, **kwargs)
        print(f"rank {self.args.rank} waits {' '.join(sorted(waits.seen))}", flush=True)
        return result

    @functools.wraps(forward)
    def begun(self: UnlearnStep, *args: Any, **kwargs: Any) -> Any:
        now[0].on = False
        return forward(self, *args, **kwargs)

    UnlearnStep.forward_backward = watched  # type: ignore[method-assign]
    UnlearnStep.forward_step = begun  # type: ignore[method-assign]
    sys.argv[0] = str(ROOT / "pretrain_unlearn.py")
    runpy.run_path(sys.argv[0], run_name="__main__")


main()
