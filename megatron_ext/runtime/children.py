"""What becomes of the process that writes checkpoints when its rank is killed or told to end."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import sys
from types import FrameType

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


def ignore_termination() -> None:
    """Go on after SIGTERM: the rank that started this process needs it for its last checkpoint.

    torchrun and Slurm send the signal to a rank together with all that it has started. With
    ``--exit-signal-handler`` the rank then saves and leaves, which ends this process too.
    """
    signal.signal(signal.SIGTERM, _terminate)


def _terminate(signum: int, frame: FrameType | None) -> None:
    # A parent that leaves ends its daemons by this signal and waits for them.
    if multiprocessing.current_process().daemon:
        signal.signal(signum, signal.SIG_DFL)
        os.kill(os.getpid(), signum)
