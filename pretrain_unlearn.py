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

from megatron_ext.exceptions import MegatronExtError  # noqa: E402
from megatron_ext.runtime import launched  # noqa: E402

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
    """Parse, check, build and train."""
    from megatron_ext.runtime import collector

    with collector.paused():
        from megatron_ext.runtime import children, compat, console, cpu, optimizer

        console.quiet()
        console.show_times()
        compat.ask_for_one_queue()
        cpu.enable()  # before anything of Megatron is imported; does nothing where a CUDA device exists

        import torch
        from megatron.core.enums import ModelType
        from megatron.training import (
            get_tensorboard_writer,
            pretrain,
            print_rank_0,
            set_startup_timestamps,
        )
        from megatron.training.argument_utils import pretrain_cfg_container_from_args

        from megatron_ext import arguments, rates, summary
        from megatron_ext.chat import write_template
        from megatron_ext.checkpoint.source import find_reference
        from megatron_ext.data.checks import check_datasets
        from megatron_ext.data.overlap import check_overlap
        from megatron_ext.data.providers import datasets_provider
        from megatron_ext.model.model_config import model_config_from_args
        from megatron_ext.plain import PlainStep
        from megatron_ext.reference import FrozenReference
        from megatron_ext.runtime import software
        from megatron_ext.training import UnlearnStep
        from megatron_ext.watch import reached_before

    compat.apply()
    optimizer.enable()
    set_startup_timestamps(program_start=_PROGRAM_START, main_entry=time.time())
    args, config, chat = arguments.parse()
    software.record(args)
    if args.rank == 0:
        print(arguments.describe_runtime(args), flush=True)
        print(software.describe(args.software), flush=True)
    if chat is None and launched.looks_at_files():
        check_datasets(args, config)
    if not args.async_save:
        children.report_in_process()
    elif args.async_strategy == "mcore":
        from megatron_ext.runtime import async_saves

        async_saves.enable()
    start = arguments.check_checkpoints(args, config)
    software.tell_changes(args, start)
    if chat is not None and args.rank == 0:
        print(chat.describe(), flush=True)
    if args.rank == 0:
        write_template(args)
    if not args.skip_train and (reason := reached_before(config, start)):
        if args.rank == 0:
            print(reason, flush=True)
        return
    if launched.looks_at_files():
        check_overlap(args, config)
    source = find_reference(args, config, start) if config.needs_reference else None
    if args.rank == 0:
        print(summary.describe(args, config, start, source), flush=True)
    rates.warn_of_end(args, start)

    model_config = model_config_from_args(args)
    container = pretrain_cfg_container_from_args(args, model_config)

    def share_software(model: list) -> list:
        software.share(args)  # there are process groups by now
        return model

    model_config.post_wrap_hooks.append(share_software)
    built: list[FrozenReference] = []
    step: PlainStep | UnlearnStep = PlainStep(args)
    if config.enabled:
        if source is not None:

            def build_reference(model: list) -> list:
                offload = config.reference_offload
                built.append(
                    FrozenReference(model_config, args=args, source=source, offload=offload)
                )
                args.unlearn_reference = built[0].record  # and so in every checkpoint
                print_rank_0(f"reference: {source.checkpoint.path}, digest {built[0].digest}")
                return model

            model_config.post_wrap_hooks.append(build_reference)
        step = UnlearnStep(args, config, reference=lambda: built[0] if built else None)
    step.install()

    provider = datasets_provider(args, config) if chat is None else chat.provider()
    try:
        pretrain(container, provider, ModelType.encoder_or_decoder, step.forward_step)
    except (
        SystemExit
    ) as leaving:  # with 0 after --exit-interval, --exit-duration-in-mins or a signal
        if leaving.code:
            raise
        if leaving.code is None and args.ckpt_convert_format is None:
            raise MegatronExtError("Megatron-Core could not go on, and says why above") from leaving
    # Megatron flushes before the last validation, whose values were then lost now and then.
    if writer := get_tensorboard_writer():
        writer.flush()
    for reference in built:
        reference.check_unchanged()
    # Leaving with live gloo threads aborts the process now and then ("terminate called ...").
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


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
            print(f"{os.path.basename(sys.argv[0])}: interrupted", file=sys.stderr, flush=True)
        _leave(130)
