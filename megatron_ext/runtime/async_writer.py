"""The process that writes checkpoints while training goes on: its life, and how it reports.

A fresh process finds these by their names. Nothing of Megatron is imported up here: before the CPU answers
for a missing GPU, Megatron's import brings torch's compiler along, 4 of 12 s on a 2-core CPU, for each rank.
"""

from __future__ import annotations

import pickle
import signal
from typing import Any

from megatron_ext.runtime import cpu
from megatron_ext.runtime.children import end_with_parent


def serve(*arguments: Any) -> None:
    """The life of the process: Megatron's own, until the rank says so or ends, however it ends.

    Args:
        *arguments: of ``PersistentAsyncCaller.async_loop``.
    """
    # torchrun and Slurm send it to the rank as well, which may need one more checkpoint.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
    end_with_parent()
    cpu.enable()
    from megatron.core.dist_checkpointing.strategies.async_utils import PersistentAsyncCaller

    PersistentAsyncCaller.async_loop(*arguments)


class Reports:
    """The queue for what was written where, which a third process holds.

    To that process a report is bytes: to take one it would import torch, 5 s and 0.3 GB of host memory for
    each rank.

    Args:
        queue: a manager's.
    """

    def __init__(self, queue: Any) -> None:
        self._queue = queue

    def put(self, report: object) -> None:
        """Hand over a report."""
        self._queue.put(pickle.dumps(report))

    def get_nowait(self) -> Any:
        """The next report.

        Raises:
            queue.Empty: there is none yet.
        """
        return pickle.loads(self._queue.get_nowait())
