"""Runs a function on real ranks: processes of their own that talk over gloo."""

import gc
import multiprocessing
import os
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

# Ranks are forks of a process that has imported torch, and nothing that a test may want to do itself.
multiprocessing.set_forkserver_preload(["torch", "torch.distributed.nn.functional"])


class RankError(Exception):
    """What a rank raised, as text."""


def run_ranks(
    fn: Callable[..., Any], world_size: int, *args: Any, timeout: float = 120.0
) -> list[Any]:
    """Calls `fn(*args)` on every rank of a fresh process group and returns what the ranks return.

    A rank has torch, and takes its test's own imports: Megatron's are 3 s, so a test does better with
    many cases in one call than with many calls.

    Args:
        fn: A function of a module (it is pickled by name); its rank is `dist.get_rank()`.
        world_size: Number of ranks.
        *args: Picklable arguments, the same on all ranks.
        timeout: Seconds for the whole call.

    Returns:
        The results in the order of the ranks; they must be picklable.

    Raises:
        RankError: A rank raised. Carries the traceback of the first that did, not of a peer that
            lost its connection to it; the others are ended.
        torch.multiprocessing.ProcessExitedException: A rank died without raising.
        TimeoutError: The ranks did not end in time; they are ended.
    """
    deadline = time.monotonic() + timeout
    with tempfile.TemporaryDirectory() as directory:
        # One thread a rank, set before the server of the forks imports torch: ranks must not fight for cores.
        with mock.patch.dict(os.environ, OMP_NUM_THREADS="1"):
            context = mp.start_processes(
                _rank_main,
                args=(world_size, directory, timeout, dict(os.environ), fn, args),
                nprocs=world_size,
                join=False,
                start_method="forkserver",
            )
        try:
            while not context.join(timeout=max(0.0, deadline - time.monotonic())):
                if time.monotonic() >= deadline:
                    running = [r for r, p in enumerate(context.processes) if p.is_alive()]
                    raise TimeoutError(
                        f"{fn.__qualname__}: ranks {running} of {world_size} still run "
                        f"after {timeout} s"
                    )
        except mp.ProcessRaisedException as error:
            raise RankError(_first_error(Path(directory))) from error
        finally:
            for process in context.processes:
                if process.is_alive():
                    process.kill()
                process.join()
        return [
            pickle.loads((Path(directory) / f"result{rank}").read_bytes())
            for rank in range(world_size)
        ]


def _first_error(directory: Path) -> str:
    # What a rank raised is written before its connections close, so before its peers can notice.
    return min((file.read_text() for file in directory.glob("error*")), key=_time_of)


def _time_of(error: str) -> float:
    return float(error.split(maxsplit=1)[0])


def _rank_main(
    rank: int,
    world_size: int,
    directory: str,
    timeout: float,
    environment: dict[str, str],
    fn: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:
    gc.freeze()
    os.environ.clear()
    os.environ.update(environment)  # the server has that of its start
    torch.set_num_threads(1)
    # A file, not a port: no two runs can race for it.
    dist.init_process_group(
        "gloo",
        init_method=f"file://{directory}/rendezvous",
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=timeout),
    )
    try:
        result = fn(*args)
        # Plain pickle, not a queue: torch would share tensors through files of a rank that is gone.
        (Path(directory) / f"result{rank}").write_bytes(pickle.dumps(result))
        dist.barrier()
    except BaseException:
        text = f"{time.monotonic():.6f} s: rank {rank} of {world_size}\n{traceback.format_exc()}"
        # Renamed into place: the parent never reads half of it.
        partial = Path(directory) / f"writing{rank}"
        partial.write_text(text)
        partial.rename(Path(directory) / f"error{rank}")
        raise
    finally:
        dist.destroy_process_group()
