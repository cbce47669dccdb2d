"""What the process needs that writes checkpoints while training goes on (``--async-save``).

Megatron starts one beside each rank and hands it the tensors of each save through queues. It waits at these
queues for ever if that process is gone, and that process for ever if the rank is gone.
"""

from __future__ import annotations

import atexit
from multiprocessing.process import BaseProcess
from queue import Empty
from typing import Any

import torch
from megatron.core.dist_checkpointing.strategies import async_utils, filesystem_async

from megatron_ext.exceptions import CheckpointError
from megatron_ext.runtime.async_writer import Reports, serve
from megatron_ext.runtime.children import termination_held

# Seconds between two looks at the process that is waited for.
INTERVAL = 1.0

_Caller = async_utils.PersistentAsyncCaller


def enable() -> None:
    """Have asynchronous saves work without CUDA, end with their rank, and end it when they fail."""
    start, results = _Caller._get_process, filesystem_async.get_write_results_queue
    prepare = filesystem_async.FileSystemWriterAsync.prepare_write_data

    def start_and_watch(rank: int, mp_mode: str = "spawn", *priorities: Any) -> BaseProcess:
        started = _Caller._persistent_process is None
        # A fork server would be the parent of the process, which then would not learn of the rank's end.
        with termination_held():
            process = start(rank, "spawn", *priorities)
        if started:
            failures: list[BaseException] = []
            for name in ("_persistent_queue", "_persistent_preload_q", "_persistent_comp_q"):
                queue = WatchedQueue(getattr(_Caller, name), process, failures)
                setattr(_Caller, name, queue)
            # It leaves signals alone; multiprocessing would send it one at exit and wait for it.
            atexit.register(process.kill)
        return process

    def prepare_copies(writer: Any, *args: Any, **kwargs: Any) -> None:
        prepare(writer, *args, **kwargs)
        # Tensors of a GPU are copied before training goes on, those in host memory would be written as they
        # change.
        writer.write_buckets = [
            (path, key, (objects, [(item, _copy_of_host(tensor)) for item, tensor in tensors]))
            for path, key, (objects, tensors) in writer.write_buckets
        ]

    def start_reports(mp_mode: str = "spawn") -> Any:
        # A fork of the rank would outlive it.
        with termination_held():
            return Reports(results("spawn"))

    setattr(_Caller, "_get_process", staticmethod(start_and_watch))  # noqa: B010
    setattr(_Caller, "async_loop", staticmethod(serve))  # noqa: B010
    filesystem_async.FileSystemWriterAsync.prepare_write_data = prepare_copies
    filesystem_async.get_write_results_queue = start_reports


class WatchedQueue:
    """A queue to or from a process: nobody waits at it for one that has ended, or that never got its work.

    Args:
        queue: of ``multiprocessing``.
        process: the other end.
        failures: of all queues to and from the process: what could not be handed over, and why.
    """

    def __init__(self, queue: Any, process: BaseProcess, failures: list[BaseException]) -> None:
        self.put = queue.put
        self._queue, self._process, self._failures = queue, process, failures
        # Python's thread that feeds the queue would print a traceback and drop the item.
        queue._on_queue_feeder_error = lambda error, _: failures.append(error)

    def get_nowait(self) -> Any:
        """The next item.

        Raises:
            Empty: there is none yet.
            CheckpointError: there will be none.
        """
        lost = self._lost()
        try:
            return self._queue.get_nowait()
        except Empty:
            if lost:
                raise self._error() from None
            raise

    def join(self) -> None:
        """Wait until all items are dealt with.

        Raises:
            CheckpointError: they will not be.
        """
        with self._queue._cond:
            while not self._queue._unfinished_tasks._semlock._is_zero():
                if self._lost():
                    raise self._error()
                self._queue._cond.wait(INTERVAL)

    def _lost(self) -> bool:
        return bool(self._failures) or not self._process.is_alive()

    def _error(self) -> CheckpointError:
        if self._failures:
            return CheckpointError(
                "--async-save: expected tensors that another process can be handed, found "
                f"{type(self._failures[0]).__name__}: {self._failures[0]}; the checkpoint is lost"
            )
        return CheckpointError(
            f"--async-save: expected a process that writes checkpoints, found it ended with exit code "
            f"{self._process.exitcode}; what it was writing is lost"
        )


def _copy_of_host(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.clone() if tensor.device.type == "cpu" else tensor
