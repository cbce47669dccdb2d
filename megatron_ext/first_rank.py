"""What one rank of a job finds out about checkpoints, for all: files are asked once, and all ranks act alike.

Thousands of ranks that each look at every file of a checkpoint keep a file server busy for minutes, while all
GPUs wait; and what they see need not be the same. The answer goes through the process group that the run
trains with, which is made a little earlier for it. The store at MASTER_ADDR would do without a group, but
torchrun keeps its own over restarts: a rank could read what an earlier start had found. Of a group only ranks
of this start are members.
"""

from __future__ import annotations

import pickle
import socket
import time
from argparse import Namespace
from collections.abc import Callable
from typing import Any

import torch
from megatron.core.dist_checkpointing.core import CONFIG_FNAME
from torch.distributed.checkpoint import CheckpointException

from megatron_ext import launched
from megatron_ext.checkpoint import safe_load
from megatron_ext.checkpoint.inspect import TRACKER, Checkpoint
from megatron_ext.checkpoint.source import (
    ReferenceSource,
    Start,
    find_reference,
    refuse_overwriting,
    resolve_start,
)
from megatron_ext.config import UnlearnConfig
from megatron_ext.exceptions import CheckpointError, MegatronExtError

# Seconds in which torchrun ends the ranks of a node of which one has failed: it sends SIGTERM at once.
_ENDED_WITHIN = 60.0
# Seconds by which a file server may show one node later than another what is new.
_LATE = 60.0


def find_start(args: Namespace, *, required: bool) -> Start:
    """Find where the run starts, on rank 0, and refuse what may not be written over.

    Args:
        args: Megatron's validated arguments; ``ckpt_step`` becomes what Megatron must be told.
        required: whether random weights would be a mistake.

    Returns:
        The same on all ranks.

    Raises:
        CheckpointError: see :func:`resolve_start`; or this node does not see the checkpoint.
        ConfigError: as well; or there are later checkpoints in ``--save``.
    """

    def find() -> tuple[Start, int | None]:
        start = resolve_start(args, required=required)
        refuse_overwriting(args, start)
        return start, args.ckpt_step

    start, args.ckpt_step = tell(args, find)
    if start.checkpoint is not None and _is_of_another_node(args):
        _wait_until_seen(start.checkpoint, flag=start.flag, tracked=True)
    return start


def find_source(args: Namespace, config: UnlearnConfig, start: Start) -> ReferenceSource:
    """Find the checkpoint of the reference, on rank 0.

    Args:
        args: Megatron's validated arguments.
        config: the settings of unlearning.
        start: where the run begins.

    Returns:
        The same on all ranks.

    Raises:
        CheckpointError: see :func:`find_reference`; or this node does not see the checkpoint.
        ConfigError: the run would overwrite it.
    """
    source = tell(args, lambda: find_reference(args, config, start))
    if _is_of_another_node(args):
        _wait_until_seen(source.checkpoint, flag="--reference-load", tracked=False)
    return source


def tell[Found](args: Namespace, find: Callable[[], Found]) -> Found:
    """Call a function on rank 0, and give all ranks what it returns, or the error that it raises.

    The others wait for it as they wait for a late rank: `--distributed-timeout-minutes` at most.

    Args:
        args: Megatron's validated arguments, which are its global ones too.
        find: what only rank 0 does; its result must be possible to pickle.

    Raises:
        MegatronExtError: of the kind and with the text of that of rank 0, on the ranks that
            :func:`launched.looks_at_files` names; torchrun ends the others of their node. Any other
            exception ends rank 0 as it is, and is named by the rest.
    """
    if args.world_size == 1:
        return find()
    answers: list[bytes | None] = [None]
    failure: BaseException | None = None
    join()
    if args.rank == 0:
        try:
            result = find()
            answers = [pickle.dumps((result, None, safe_load.known()))]
        # torch's error is no Exception. The others would wait for this rank in vain.
        except (Exception, CheckpointException) as error:
            failure = error
            answers = [pickle.dumps((None, _refusal(error), {}))]
    torch.distributed.broadcast_object_list(answers, src=0)
    if failure is not None:
        raise failure
    if args.rank == 0:
        return result
    assert answers[0] is not None
    told, refusal, known = pickle.loads(answers[0])
    if refusal is not None:
        _refuse(*refusal)
    safe_load.adopt(known)
    return told


def join() -> None:
    """Make the process group of all ranks as Megatron would a little later, which then leaves that out.

    The ranks connect at once, as in Megatron's own barrier, and not only when rank 0 has found something:
    where torchrun keeps its store over restarts, one that comes long before rank 0 would read the address of
    the rank 0 before.
    """
    if not torch.distributed.is_initialized():
        from megatron.training import initialize

        initialize_distributed: Any = initialize._initialize_distributed
        initialize_distributed(None, None, None, skip_model_parallel_init=True)
        torch.distributed.barrier()


def leave() -> None:
    """End the process group, if there is one.

    Leaving with live threads of gloo aborts the process now and then ("terminate called ...").
    """
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


def _wait_until_seen(checkpoint: Checkpoint, *, flag: str, tracked: bool) -> None:
    """Wait until this node sees a checkpoint that another node has found complete.

    A file server may show a node a new file late. Megatron would start this node's ranks from random weights
    if the tracker file were missing here.

    Args:
        checkpoint: what will be loaded.
        flag: the flag that named it, for messages.
        tracked: whether Megatron finds it by the tracker file.

    Raises:
        CheckpointError: it has not come after a minute.
    """
    expected = [checkpoint.path / CONFIG_FNAME]
    if tracked:
        expected.append(checkpoint.directory / TRACKER)
    deadline = time.monotonic() + _LATE
    while missing := [file for file in expected if not file.is_file()]:
        if time.monotonic() > deadline:
            raise CheckpointError(
                f"{flag}: expected {missing[0]} on each node, as on that of rank 0, found none on "
                f"{socket.gethostname()}"
            )
        time.sleep(1)


def _is_of_another_node(args: Namespace) -> bool:
    """Whether this rank answers for what its node sees; rank 0 has looked already."""
    return bool(args.rank) and launched.looks_at_files()


def _refusal(error: BaseException) -> tuple[type[MegatronExtError], str]:
    if isinstance(error, MegatronExtError):
        return type(error), str(error)
    return MegatronExtError, f"rank 0 ended with {type(error).__name__}: {error}"


def _refuse(kind: type[MegatronExtError], text: str) -> None:
    if not launched.looks_at_files():
        # One line a node says it; this rank's end would end that of the line before it is out.
        time.sleep(_ENDED_WITHIN)
    raise kind(text)
