"""What becomes of the process that writes checkpoints when its rank is killed or told to end."""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import os
import queue
import signal
import sys
from collections.abc import Iterator
from multiprocessing import resource_tracker
from types import FrameType
from typing import Any

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
    """Go on after SIGTERM and Ctrl-C: the rank that started this process needs it for its last checkpoint.

    torchrun and Slurm send the signal to a rank together with all that it has started. With
    ``--exit-signal-handler`` the rank then saves and leaves, which ends this process too. A terminal sends
    Ctrl-C to all of them; a rank that does not save then kills this process.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _terminate)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})  # see `termination_held`


@contextlib.contextmanager
def termination_held() -> Iterator[None]:
    """Have processes that are started meanwhile not see SIGTERM before they call `ignore_termination`.

    Python takes a second or more to start, on a busy machine, and would die of a signal that comes then.
    What blocks a signal here is handed on to what this thread starts; the other threads of this process
    still get it.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR2})
    try:
        # The first spawn would start it, and unblock SIGTERM. It would die of what shows the stacks of a run.
        resource_tracker.ensure_running()
        signal.pthread_sigmask(signal.SIG_SETMASK, {*before, signal.SIGTERM})
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def report_in_process() -> None:
    """Let the writers of a checkpoint report within this process: without `--async-save` no other one writes.

    Megatron starts one on every rank for the queue in between, and it imports torch to take a report: 5 s of
    a first save on a slow CPU, and 0.3 GB of memory.
    """
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    reports: queue.Queue[Any] = queue.Queue()
    filesystem_async.get_write_results_queue = lambda *_, **__: reports


def _terminate(signum: int, frame: FrameType | None) -> None:
    # A parent that leaves ends its daemons by this signal and waits for them.
    if multiprocessing.current_process().daemon:
        signal.signal(signum, signal.SIG_DFL)
        os.kill(os.getpid(), signum)
