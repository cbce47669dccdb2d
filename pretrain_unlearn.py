#!/usr/bin/env python
"""Pre-train, continue, unlearn (arXiv 2406.12397) or tune on conversations, in Megatron's training loop.

One entry point for every stage. Without ``--forget-data-path`` it is plain Megatron pre-training; with it,
``--forget-data-path`` is forgotten and ``--data-path`` replayed against a frozen reference; with
``--chat-data-path`` the assistant's part of conversations is learnt. Every flag of Megatron-LM works as
it does there; ``--help`` lists those of this program at its end.
"""

from __future__ import annotations

import time

_PROGRAM_START = time.time()

import contextlib  # noqa: E402
import faulthandler  # noqa: E402
import logging  # noqa: E402
import multiprocessing  # noqa: E402
import os  # noqa: E402
import signal  # noqa: E402
import sys  # noqa: E402
from typing import NoReturn  # noqa: E402

from megatron_ext import launched  # noqa: E402
from megatron_ext.exceptions import MegatronExtError  # noqa: E402

# Nothing heavy is imported up here: with --async-save Megatron starts processes that import this file again,
# and waits for them. With torch and Megatron up here that took 7 s, without 2 s (2-core CPU).

if __name__ in ("__main__", "__mp_main__"):
    # Of a run that hangs: the stacks of all threads, to stderr.
    faulthandler.register(signal.SIGUSR2, all_threads=True)

if __name__ == "__mp_main__":
    from megatron_ext.runtime import console
    from megatron_ext.runtime.children import end_with_parent, ignore_termination

    end_with_parent()
    ignore_termination()
    console.quiet()  # a process that writes while training goes on imports it all


def main() -> None:
    """Make Megatron fit for this machine, import it, and run."""
    from megatron_ext.runtime import collector

    with collector.paused():
        from megatron_ext.runtime import compat, console, cpu

        console.quiet()
        console.show_times()
        console.write_whole_lines()
        compat.ask_for_one_queue()
        cpu.enable()  # before anything of Megatron is imported; does nothing where a CUDA device exists

        from megatron_ext.run import run

    run(program_start=_PROGRAM_START)


def _saved() -> str:
    """What is kept of a run that is interrupted, to end its last line."""
    state = sys.modules.get("megatron.training.global_vars")
    args = getattr(state, "_GLOBAL_ARGS", None)
    if args is None or not args.save or args.skip_train:
        return ""
    from megatron_ext.checkpoint.inspect import tracked

    latest = None
    with contextlib.suppress(OSError):
        latest = tracked(args.save)
    if latest is None:
        return f"; --save {args.save} holds no checkpoint"
    return f"; the last iteration saved in --save {args.save} is {latest}"


def _leave(code: int) -> NoReturn:
    """End at once, with all that was started; TensorBoard holds back what two minutes have logged."""
    state = sys.modules.get("megatron.training.global_vars")
    if writer := getattr(state, "_GLOBAL_TENSORBOARD_WRITER", None):
        with contextlib.suppress(OSError):  # a full disk may be why the run ends
            writer.flush()
    # The process that writes checkpoints would outlive this one, and keep its output open.
    for child in multiprocessing.active_children():
        child.kill()
    # A rank that is waiting in a collective for this one is ended by torchrun, not by a shutdown here.
    os._exit(code)


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING)
    try:
        main()
    except MegatronExtError as error:
        rank = launched.rank()
        where = f" (rank {rank})" if rank != "0" else ""
        print(
            f"{os.path.basename(sys.argv[0])}: error{where}: {error}", file=sys.stderr, flush=True
        )
        _leave(2)
    except KeyboardInterrupt:
        if launched.rank() == "0":
            name = os.path.basename(sys.argv[0])
            print(f"{name}: interrupted{_saved()}", file=sys.stderr, flush=True)
        _leave(130)
