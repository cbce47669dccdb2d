"""A distributed model opened for looking at, without a training loop."""

from __future__ import annotations

import contextlib
from argparse import Namespace
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.transformer.enums import AttnBackend

from megatron_ext.arguments import add_arguments, record_tokenizer
from megatron_ext.batches import check_copies
from megatron_ext.checkpoint.inspect import (
    ARCHITECTURE,
    ROUTING_RULES,
    Checkpoint,
    routing_rule,
)
from megatron_ext.data.checks import check_tokenizer_place
from megatron_ext.exceptions import ConfigError
from megatron_ext.model.model_config import model_config_from_args
from megatron_ext.runtime import compat, console

# Besides the architecture, what a checkpoint's arguments say of how to run its model.
_RUN = (
    "max_position_embeddings",
    "seq_length",
    "bf16",
    "fp16",
    "rotary_seq_len_interpolation_factor",
)


@dataclass
class Session:
    """Megatron's global state, set up for one architecture.

    Attributes:
        args: Megatron's validated arguments.
        eod: id of the token that ends documents.
        bos: id of the one with which the tokenizer may begin them; ``None`` if it has none.
    """

    args: Namespace
    model_config: Any
    eod: int
    bos: int | None = None

    @property
    def is_writer(self) -> bool:
        """Whether this rank holds the results and writes them."""
        last = parallel_state.is_pipeline_last_stage(ignore_virtual=True)
        first = parallel_state.get_tensor_model_parallel_rank() == 0
        return last and first and parallel_state.get_data_parallel_rank() == 0


@contextlib.contextmanager
def open_session(
    options: Namespace, checkpoint: Checkpoint, *, length: int | None = None
) -> Iterator[Session]:
    """Set Megatron up for the architecture of a checkpoint, behind `compat.apply`.

    Args:
        options: ``tokenizer_type``, ``tokenizer_model``, ``micro_batch_size``,
            ``tensor_model_parallel_size``, ``pipeline_model_parallel_size``.
        checkpoint: of the model, or the first of several.
        length: tokens of a sequence, if fewer than the model's: text is padded to it.

    Raises:
        ConfigError: there are too few ranks, no such tokenizer, or Megatron refuses the settings.
    """
    from megatron.training import get_tokenizer
    from megatron.training import training as loop
    from megatron.training.global_vars import set_global_variables

    with console.hidden():
        args = _arguments(options, checkpoint, length)
        check_tokenizer_place(args)
        compat.leave_transformers_out(args.tokenizer_type)
        try:
            set_global_variables(args)
        except (OSError, RuntimeError, ValueError) as error:
            raise ConfigError(
                f"--tokenizer-model {options.tokenizer_model} cannot be loaded: {error}"
            ) from error
        record_tokenizer(args)
        model_config = model_config_from_args(args)
        loop.initialize_megatron()
    try:
        tokenizer = get_tokenizer()
        # A tokenizer of numbers lacks the attribute.
        bos = getattr(tokenizer, "bos", None)
        yield Session(args, model_config, eod=tokenizer.eod, bos=bos)
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def _arguments(options: Namespace, checkpoint: Checkpoint, length: int | None) -> Namespace:
    """Megatron's arguments for running the model of a checkpoint."""
    from megatron.training.arguments import parse_args, validate_args

    saved = checkpoint.args
    given: Sequence[object] = (
        *("--micro-batch-size", options.micro_batch_size),
        *("--tensor-model-parallel-size", options.tensor_model_parallel_size),
        *("--pipeline-model-parallel-size", options.pipeline_model_parallel_size),
        *("--tokenizer-type", options.tokenizer_type),
        *("--tokenizer-model", options.tokenizer_model),
        *("--train-iters", 1, "--lr", 0.0),
    )
    with compat.command_line(given):
        args = parse_args(add_arguments)
    check_copies(args)
    for name in (*ARCHITECTURE, *_RUN, "group_query_attention", "num_query_groups"):
        if hasattr(saved, name):
            setattr(args, name, getattr(saved, name))
    if routing_rule(saved) in ROUTING_RULES:  # the others have no part in a forward pass
        args.moe_router_load_balancing_type = routing_rule(saved)
    if length is not None:
        if length > args.seq_length:
            raise ConfigError(
                f"--length: expected at most {args.seq_length}, the sequence length of {checkpoint.path}, "
                f"found {length}"
            )
        args.seq_length = length
    try:
        validate_args(args)
    except (AssertionError, ValueError) as error:
        raise ConfigError(f"refused by Megatron-Core: {error}") from error
    if args.transformer_impl == "local":
        # cuDNN plans each length anew, of which prompts and texts have many.
        args.attention_backend = AttnBackend.flash
    return args
