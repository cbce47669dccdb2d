"""What becomes of the process that writes checkpoints when its rank is killed."""

from __future__ import annotations

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def end_with_parent() -> None:
    """Have the kernel kill this process when the one that started it dies, however it dies.

    A rank that is killed cannot end its children. The one that Megatron starts for checkpoints would
    wait for ever, and hold the run's output open: ``torchrun ... | tee log`` would never return.
    """
    if sys.platform != "linux":
        return
    parent = os.getppid()
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died in between
        os._exit(1)
