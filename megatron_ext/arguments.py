"""The product's flags beside Megatron's, and their checks before torch.distributed starts.

What a machine without CUDA or without Transformer Engine needs is set here by itself.
"""

from __future__ import annotations

import importlib.util
import sys
from argparse import ArgumentParser, Namespace
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from megatron.training import get_tokenizer
from megatron.training.argument_utils import ArgumentGroupFactory
from megatron.training.arguments import parse_and_validate_args, parse_args

from megatron_ext import first_rank, launched, machine_refusals, refusals
from megatron_ext.batches import check_batches, check_layout
from megatron_ext.chat import ChatRun, chat_run, warn_of_template
from megatron_ext.chat import check_resume as check_chat_resume
from megatron_ext.checkpoint.kinds import check_plain, check_unlearning, tell_changes
from megatron_ext.checkpoint.resumable import check_resumable, keep_buckets
from megatron_ext.checkpoint.source import Start
from megatron_ext.checkpoint.whole_weights import keep_whole
from megatron_ext.company import check_company, check_index, check_routing
from megatron_ext.config import ChatConfig, RunConfig, UnlearnConfig
from megatron_ext.data.checks import check_tokenizer_place, check_vocabulary
from megatron_ext.data.tokenizers import TOKENIZER_TYPES, TokenizerSpec, tokenizer_digest
from megatron_ext.exceptions import ConfigError, flag_name, refused_by_megatron
from megatron_ext.noise import warn_of_noise
from megatron_ext.runtime import compat, console, cpu
from megatron_ext.stages import check_pipeline
from megatron_ext.values import (
    check_experts,
    check_places,
    check_required,
    check_schedule,
    check_sizes,
    check_training,
    check_values,
)
from megatron_ext.watch import warn_of_unfinished


def add_arguments(parser: ArgumentParser) -> ArgumentParser:
    """Add the product's flags and this machine's defaults to Megatron's parser."""
    chat = ArgumentGroupFactory(ChatConfig).build_group(parser, "chat tuning")
    unlearning = ArgumentGroupFactory(UnlearnConfig).build_group(
        parser, "unlearning (arXiv 2406.12397)"
    )
    logs = ArgumentGroupFactory(RunConfig).build_group(parser, "logs and checkpoints")
    for action in (*chat._group_actions, *unlearning._group_actions, *logs._group_actions):
        if action.default:  # those with another meaning say it themselves
            action.help = f"{action.help} Default: {action.default}."
    compat.repair_help(parser)
    parser.set_defaults(**machine_defaults())
    console.suggest_flags(parser)
    # A mistyped flag printed the 750 lines of all of Megatron's before the error, on every rank.
    parser.usage = "%(prog)s FLAGS (--help lists them; those of this program are at its end)"
    return parser


def machine_defaults() -> dict[str, Any]:
    """Megatron's arguments that this machine needs; a flag that the user types wins over each."""
    # Attention is causal everywhere here, so no layer asks the loader for a [s, s] mask.
    # Megatron-LM's documented interval; without one its loop divides by None.
    defaults: dict[str, Any] = {
        "create_attention_mask_in_dataloader": False,
        "eval_interval": 1000,
        "rerun_mode": "disabled",  # see finite.py
        # Without it Megatron takes --async-save back; the other strategy is a package of NVIDIA's own.
        "use_persistent_ckpt_worker": True,
        "async_strategy": "mcore",
    }
    if not _installed("one_logger"):
        defaults |= {"enable_one_logger": False}  # a warning asks for this package of NVIDIA's own
    if not _installed("transformer_engine"):
        defaults |= {"transformer_impl": "local"}
    if not _installed("apex"):
        defaults |= {"no_persist_layer_norm": True, "masked_softmax_fusion": False}
    if not _installed("transformer_engine") and not _installed("apex"):
        defaults |= {"apply_rope_fusion": False}
    return defaults | (cpu.CPU_FLAGS if cpu.is_enabled() else {})


def _installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def parse() -> tuple[Namespace, UnlearnConfig, ChatRun | None]:
    """Parse the command line, check it, and set Megatron's global arguments.

    Returns:
        Megatron's arguments, validated by Megatron; the settings of unlearning; and the data of chat
        tuning, if that is what the command line asks for.

    Raises:
        ConfigError: a flag or a combination that cannot work; the message names it.
        DataError: a file of conversations cannot be used.
    """
    if any(word.partition("=")[0] == "--yaml-cfg" for word in sys.argv):  # the parser would read it
        refusals.refuse(Namespace(yaml_cfg=True), refusals.NEVER, where="is not supported")
    raw = parse_args(add_arguments)
    config = unlearn_config(raw)
    check_before_megatron(raw, config)
    check_values(raw)
    check_training(raw)
    check_company(raw)
    if not raw.use_checkpoint_args:
        _check_model(raw)
    check_index(raw)
    check_places(raw)
    check_tokenizer_place(raw)
    _config(RunConfig, raw)  # checks itself
    chat, chat_config = None, _config(ChatConfig, raw)
    if chat_config.enabled:
        _check_start(raw, flag="--chat-data-path")
        chat = chat_run(raw, chat_config)
    check_required(raw, supplied={} if chat is None else chat.defaults)

    def add_all(parser: ArgumentParser) -> ArgumentParser:
        add_arguments(parser).set_defaults(**({} if chat is None else chat.defaults))
        return parser

    compat.leave_transformers_out(raw.tokenizer_type)
    try:
        args = parse_and_validate_args(add_all)
    except (AssertionError, ValueError, RuntimeError) as error:
        raise refused_by_megatron(error) from error
    except SystemExit as leaving:
        if leaving.code:
            raise
        raise ConfigError("refused by Megatron-Core, which says why above") from leaving
    if raw.use_checkpoint_args:  # then the command line does not tell
        _check_model(args)
    record_tokenizer(args)
    args.chat_digest = args.tuned_chat_template = None
    if chat is not None:
        chat.record(args)
    check_schedule(args)
    check_vocabulary(args)
    check_batches(args, config)
    return args, config, chat


def _check_model(args: Namespace) -> None:
    check_sizes(args)
    check_experts(args)
    check_routing(args)
    check_pipeline(args)
    check_layout(args)


def record_tokenizer(args: Namespace) -> None:
    """Keep in the arguments, and so in every checkpoint, which tokenizer the model was trained with."""
    args.unpadded_vocab_size = get_tokenizer().vocab_size
    if args.padded_vocab_size is None:  # after --no-pad-vocab-size, and then nothing has a size
        args.padded_vocab_size = args.unpadded_vocab_size
    args.tokenizer_digest = None
    if args.tokenizer_type in TOKENIZER_TYPES:
        spec = TokenizerSpec(
            tokenizer_type=args.tokenizer_type, tokenizer_model=args.tokenizer_model
        )
        args.tokenizer_digest = tokenizer_digest(spec)


def check_checkpoints(args: Namespace, config: UnlearnConfig) -> Start:
    """Find and check the checkpoint that the run starts from or goes on from.

    What the run records of itself goes into the arguments, and so into every checkpoint.

    Raises:
        CheckpointError: it is missing where the run cannot do without, unreadable, or of another model.
        ConfigError: the run cannot go on from it.
    """
    required = config.enabled or args.chat_digest is not None
    start = first_rank.find_start(args, required=required)
    warn_of_unfinished(args, start)
    if start.checkpoint is not None:
        if args.chat_digest is None:
            # What is trained on from a tuned model still speaks its template.
            args.tuned_chat_template = getattr(start.checkpoint.args, "tuned_chat_template", None)
        elif not start.resumed:
            warn_of_template(start.checkpoint, args)
    args.unlearn_composition = args.unlearn_reference = None
    if config.enabled:
        warn_of_noise(args, config)
        args.unlearn_composition = _composition(args, config)
        check_unlearning(start, args.unlearn_composition)
        # A part of the run without the mitigation term hands the record on.
        args.unlearn_reference = start.recorded("unlearn_reference")
    elif args.chat_digest is None:
        check_plain(start, args)
    tell_changes(start, args, config)
    args.consumed_data = start.recorded("consumed_data")  # to be gone on with when there are data
    if args.ckpt_convert_format is not None:  # without a step there is no other
        args.unlearn_watch = start.recorded("unlearn_watch")
    keep_whole(args, start.before)
    if start.before is not None:
        if args.chat_digest is not None:
            check_chat_resume(start.before.args, args)
        check_resumable(start.before, args)
        keep_buckets(start.before, args)
    return start


def _composition(args: Namespace, config: UnlearnConfig) -> dict[str, int]:
    """By flag, the samples that the order of the data follows from."""
    batch = args.global_batch_size
    return {
        "--global-batch-size": batch,
        "--forget-batch-size": config.forget_samples(batch, train_global_batch_size=batch),
        "--eval-global-batch-size": args.eval_global_batch_size,
    }


def unlearn_config(args: Namespace) -> UnlearnConfig:
    """The settings of unlearning among parsed arguments."""
    return _config(UnlearnConfig, args)


def _config[Config: (UnlearnConfig, ChatConfig, RunConfig)](
    of: type[Config], args: Namespace
) -> Config:
    return of(**{f.name: getattr(args, f.name) for f in fields(of)})


def check_before_megatron(args: Namespace, config: UnlearnConfig) -> None:
    """Refuse what Megatron would only find out about in the middle of a run, or not at all.

    Raises:
        ConfigError: names the flag, what was expected and what was found.
    """
    rows = [*refusals.NEVER, *refusals.WITH_DOCUMENTS]
    for package, needed in machine_refusals.WITHOUT_PACKAGE.items():
        rows += () if _installed(package) else needed
    if args.use_distributed_optimizer or args.optimizer.startswith("dist_"):
        rows += refusals.WITH_DISTRIBUTED_OPTIMIZER
    if cpu.is_enabled():
        rows += machine_refusals.WITHOUT_CUDA
    if args.spec is not None:
        rows += refusals.WITH_LAYERS_OF_SPEC
    elif args.transformer_impl == "local":
        rows += refusals.WITH_TORCH_NATIVE_LAYERS
    refusals.refuse(args, rows, where="is not supported")
    over_ranks = args.dataloader_inter_document_masking and args.context_parallel_size > 1
    if over_ranks and args.transformer_impl != "local":
        where = "over context-parallel ranks, beside --dataloader-inter-document-masking"
        refusals.refuse(args, refusals.WITH_DOCUMENTS_OVER_RANKS, where=where)
    if args.dataset_log_interval is not None:
        where = "cannot be combined with --dataset-log-interval"
        refusals.refuse(args, refusals.WITH_DATASET_LOG, where=where)
    if config.enabled:
        refusals.refuse(
            args, refusals.WITH_UNLEARNING, where="cannot be combined with --forget-data-path"
        )
        _check_start(args, flag="--forget-data-path")
    else:
        refusals.refuse(
            args, refusals.WITHOUT_UNLEARNING, where="needs --forget-data-path, found none"
        )


def _check_start(args: Namespace, *, flag: str) -> None:
    """Unlearning and chat tuning start from a trained model, and a reference is one."""
    for name in ("load", "pretrained_checkpoint", "reference_load"):
        directory = getattr(args, name)
        # --load may name the run's own, still empty, directory beside --pretrained-checkpoint.
        if directory is None or (name == "load" and args.pretrained_checkpoint is not None):
            continue
        if launched.looks_at_files() and not Path(directory).is_dir():
            raise ConfigError(
                f"{flag_name(name)}: expected a checkpoint directory, found nothing at {directory}"
            )
    if args.load is None and args.pretrained_checkpoint is None:
        raise ConfigError(
            f"{flag}: expected --load or --pretrained-checkpoint, the trained model to start from; "
            "found neither"
        )


def describe_runtime(args: Namespace) -> str:
    """One line that says what the run will stand on.

    Args:
        args: Megatron's validated arguments.
    """
    if cpu.is_enabled():
        flags = ", ".join(f"{k.replace('_', '-')}={v}" for k, v in cpu.CPU_FLAGS.items())
        return f"no CUDA device: running Megatron's loop on the CPU over gloo ({flags})"
    if args.spec is not None:
        layers = f"layers of --spec {' '.join(args.spec)}"
    elif args.transformer_impl == "local":
        layers = "torch-native layers"
    else:
        layers = "Transformer Engine"
    return f"{torch.cuda.get_device_name()}: {layers}"
