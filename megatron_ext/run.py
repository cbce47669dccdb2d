"""A run, from its command line to its end: parse, check, build, train."""

from __future__ import annotations

import time
from argparse import Namespace
from typing import Any

from megatron.core.enums import ModelType
from megatron.training import (
    get_tensorboard_writer,
    pretrain,
    print_rank_0,
    set_startup_timestamps,
)
from megatron.training.argument_utils import pretrain_cfg_container_from_args

from megatron_ext import arguments, first_rank, launched, rates, summary
from megatron_ext.chat import ChatRun, write_template
from megatron_ext.checkpoint.complete import looked_at_once
from megatron_ext.checkpoint.source import ReferenceSource, Start
from megatron_ext.config import UnlearnConfig
from megatron_ext.data.checks import check_datasets
from megatron_ext.data.overlap import check_overlap
from megatron_ext.data.providers import datasets_provider
from megatron_ext.exceptions import MegatronExtError
from megatron_ext.model.model_config import model_config_from_args
from megatron_ext.plain import PlainStep
from megatron_ext.reference import FrozenReference
from megatron_ext.runtime import children, compat, optimizer, software
from megatron_ext.training import UnlearnStep
from megatron_ext.watch import reached_before


def run(*, program_start: float) -> None:
    """Parse, check, build and train.

    Args:
        program_start: seconds since the epoch.

    Raises:
        MegatronExtError: the run cannot start, go on or end well; says why.
    """
    compat.apply()
    optimizer.enable()
    set_startup_timestamps(program_start=program_start, main_entry=time.time())
    args, config, chat = arguments.parse()
    with looked_at_once():
        start = _check(args, config, chat)
        if not args.skip_train and (reason := reached_before(config, start)):
            if args.rank == 0:
                print(reason, flush=True)
            first_rank.leave()
            return
        if launched.looks_at_files():
            check_overlap(args, config)
        source = None
        if config.needs_reference:
            source = first_rank.find_source(args, config, start)
    if args.rank == 0:
        print(summary.describe(args, config, start, source), flush=True)
    rates.warn_of_end(args, start)

    model_config = model_config_from_args(args)
    container = pretrain_cfg_container_from_args(args, model_config)
    step, references = _build_step(args, config, model_config, source)
    provider = datasets_provider(args, config) if chat is None else chat.provider(args)
    try:
        pretrain(container, provider, ModelType.encoder_or_decoder, step.forward_step)
    # With 0 after --exit-interval, --exit-duration-in-mins or a signal.
    except SystemExit as leaving:
        if leaving.code:
            raise
        if leaving.code is None and args.ckpt_convert_format is None:
            raise MegatronExtError("Megatron-Core could not go on, and says why above") from leaving
    # Megatron flushes before the last validation, whose values were then lost now and then.
    if writer := get_tensorboard_writer():
        writer.flush()
    for reference in references:
        reference.check_unchanged()
    first_rank.leave()


def _check(args: Namespace, config: UnlearnConfig, chat: ChatRun | None) -> Start:
    """Say what the run stands on; check its data, and the checkpoint that it begins with."""
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
    if args.rank == 0:
        if chat is not None:
            print(chat.describe(), flush=True)
        write_template(args)
    return start


def _build_step(
    args: Namespace, config: UnlearnConfig, model_config: Any, source: ReferenceSource | None
) -> tuple[PlainStep | UnlearnStep, list[FrozenReference]]:
    """Put a step into Megatron's loop, and into the model's config what is due once the model is built.

    Returns:
        The step; and a list that holds the reference from then on, if there is one.
    """

    def share_software(model: list) -> list:
        software.share(args)  # there are process groups by now
        return model

    def build_reference(model: list) -> list:
        assert source is not None
        offload = config.reference_offload
        built.append(FrozenReference(model_config, args=args, source=source, offload=offload))
        args.unlearn_reference = built[0].record  # and so in every checkpoint
        print_rank_0(f"reference: {source.checkpoint.path}, digest {built[0].digest}")
        return model

    built: list[FrozenReference] = []
    model_config.post_wrap_hooks.append(share_software)
    if source is not None:
        model_config.post_wrap_hooks.append(build_reference)
    per_dataset = args.dataset_log_interval is not None
    step: PlainStep | UnlearnStep = PlainStep(args, per_dataset=per_dataset)
    if config.enabled:
        step = UnlearnStep(
            args,
            config,
            reference=lambda: built[0] if built else None,
            per_dataset=per_dataset,
        )
    step.install()
    return step, built
