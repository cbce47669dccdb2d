"""Work in many processes, such as encoding, with results in the order of the input."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.process import BaseProcess
from typing import TYPE_CHECKING, Any

from megatron_ext.data.documents import Block
from megatron_ext.data.encode import BlockEncoder, EncodedBlock
from megatron_ext.data.fast_tokenizer import FastTokenizer, build_fast
from megatron_ext.data.tokenizers import Tokenizer, TokenizerSpec, build_reference
from megatron_ext.exceptions import DataError

if TYPE_CHECKING:
    from megatron_ext.data.conversations import ConversationFormat

# Of glibc's malloc.h; and the largest allocation that it does not ask the system for each time anew.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_LARGEST = 32 << 20
# Tasks on their way for each worker: one in work, one waiting, so that none idles while results
# are written.
_TASKS_PER_WORKER = 2

_encoder: BlockEncoder | None = None  # of a worker process


def encode_in_order(
    blocks: Iterable[Block],
    tokenizer: Tokenizer,
    spec: TokenizerSpec,
    *,
    keys: Sequence[str],
    append_eod: bool,
    workers: int,
    conversations: ConversationFormat | None = None,
) -> Iterator[EncodedBlock]:
    """Encodes blocks, yielding the results in the order of the blocks.

    Args:
        blocks: Read no faster than they are encoded.
        tokenizer: Used in this process if `workers` is 1.
        spec: What each worker process loads the same tokenizer from.
        keys: Keys of a record.
        append_eod: As in `BlockEncoder`.
        workers: Processes; 1 means this one.
        conversations: As in `BlockEncoder`.

    Raises:
        DataError: A worker died.
        BackendMismatchError: From the encoder.
    """
    if workers == 1:
        encoder = BlockEncoder(
            tokenizer, keys=keys, append_eod=append_eod, conversations=conversations
        )
        yield from map(encoder, blocks)
        return
    yield from in_order(
        _encode,
        blocks,
        workers=workers,
        initializer=_load,
        initargs=(
            *(spec, isinstance(tokenizer, FastTokenizer)),
            *(list(keys), append_eod, conversations),
        ),
        describe=lambda block: f"{block.path}:{block.first}",
    )


def in_order[Task, Result](
    function: Callable[[Task], Result],
    tasks: Iterable[Task],
    *,
    workers: int,
    initializer: Callable[..., None],
    initargs: tuple[Any, ...] = (),
    describe: Callable[[Task], str] | None = None,
) -> Iterator[Result]:
    """Works on tasks in processes of their own, yielding the results in the order of the tasks.

    Args:
        function: Of a module, as are its arguments.
        tasks: Taken no faster than they are worked on.
        workers: Processes; they are started when there is work for them.
        initializer: Called in each process first; `start_worker`, or what calls it.
        initargs: Its arguments.
        describe: Names a task, for the message.

    Raises:
        DataError: A worker died; names the tasks that were in work then.
    """
    keep_memory()
    pool = ProcessPoolExecutor(
        workers,
        # Not fork: the parent may hold threads (a progress bar's, a tokenizer's).
        mp_context=multiprocessing.get_context("spawn"),
        initializer=initializer,
        initargs=initargs,
    )
    waiting: deque[tuple[Task, Future[Result]]] = deque()

    def first() -> Result:
        result = waiting[0][1].result()
        waiting.popleft()
        return result

    try:
        for task in tasks:
            waiting.append((task, pool.submit(function, task)))
            if len(waiting) >= workers * _TASKS_PER_WORKER:
                yield first()
        while waiting:
            yield first()
    except BrokenProcessPool as error:
        # A task that was submitted to a broken pool is not among those that wait.
        names = [describe(task) for task, _ in waiting] if describe is not None else []
        names = [f"{names[0]} to {names[-1]}" if len(names) > 1 else name for name in names[:1]]
        raise DataError(
            "a worker process died, most often for lack of memory: try fewer --workers"
            + "".join(f"; in work were {name}" for name in names)
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def start_worker() -> None:
    """Has a new worker process end with its parent, and leave Ctrl-C to it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    keep_memory()
    parent = multiprocessing.parent_process()
    assert parent is not None
    # A worker whose parent was killed would wait for work for ever.
    threading.Thread(target=_exit_with, args=(parent,), daemon=True).start()


def keep_memory() -> None:
    """Has memory that is freed stay with this process for the next block.

    glibc gives what a block took back to the system, which clears each page of it for the next one. Other
    C libraries decide for themselves.
    """
    set_option = getattr(ctypes.CDLL(None), "mallopt", None)
    if set_option is not None:
        set_option(_MMAP_THRESHOLD, _LARGEST)
        set_option(_TRIM_THRESHOLD, 8 * _LARGEST)


def _load(
    spec: TokenizerSpec,
    fast: bool,
    keys: list[str],
    append_eod: bool,
    conversations: ConversationFormat | None,
) -> None:
    """Loads the tokenizer into a new worker process."""
    global _encoder
    start_worker()
    reference = build_reference(spec)
    tokenizer = build_fast(spec, reference) if fast else reference
    _encoder = BlockEncoder(
        tokenizer, keys=keys, append_eod=append_eod, conversations=conversations
    )


def _exit_with(parent: BaseProcess) -> None:
    parent.join()
    os._exit(1)


def _encode(block: Block) -> EncodedBlock:
    assert _encoder is not None
    return _encoder(block)
