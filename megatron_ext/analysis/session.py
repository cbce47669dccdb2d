"""A distributed model opened for looking at, without a training loop."""

from __future__ import annotations

import contextlib
import logging
from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from megatron.core import parallel_state
from megatron.core.transformer.enums import AttnBackend

from megatron_ext.analysis.embeddings import MIN_SAMPLES
from megatron_ext.analysis.forward import embed_samples
from megatron_ext.analysis.perplexity import score_samples
from megatron_ext.analysis.records import record_run
from megatron_ext.analysis.samples import check_samples, read_samples
from megatron_ext.arguments import add_arguments, record_tokenizer
from megatron_ext.checkpoint.inspect import (
    ARCHITECTURE,
    ROUTING_RULES,
    Checkpoint,
    check_architecture,
    routing_rule,
)
from megatron_ext.checkpoint.named import open_named, short_names
from megatron_ext.data.manifest import check_prefix
from megatron_ext.exceptions import CheckpointError, ConfigError
from megatron_ext.frozen import FrozenModel
from megatron_ext.model.model_config import model_config_from_args
from megatron_ext.runtime import compat, console

logger = logging.getLogger(__name__)

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
        options: the tool's own.
        eod: id of the token that ends documents.
        bos: id of the one with which the tokenizer may begin them; ``None`` if it has none.
    """

    args: Namespace
    options: Namespace
    model_config: Any
    eod: int
    bos: int | None = None

    @property
    def is_writer(self) -> bool:
        """Whether this rank holds the results and writes them."""
        last = parallel_state.is_pipeline_last_stage(ignore_virtual=True)
        first = parallel_state.get_tensor_model_parallel_rank() == 0
        return last and first and parallel_state.get_data_parallel_rank() == 0

    def check_models(self) -> None:
        """Open all checkpoints, without their tensors, and compare them before any of them is run.

        Raises:
            CheckpointError: one cannot be read, or is of another architecture, vocabulary or tokenizer than
                the first.
        """
        for directory in self.options.checkpoint:
            checkpoint = open_named(directory, flag="--checkpoint")
            check_architecture(checkpoint, self.args, flag="--checkpoint")

    def perplexities(self, directory: str, sets: Mapping[str, str]) -> dict[str, Any]:
        """Per-sample scores of every set under a checkpoint.

        Args:
            directory: checkpoint directory, or an iteration of it.
            sets: dataset prefix of each set.

        Returns:
            What the model is, and for each set the loss, mean probability and number of tokens of every
            sample; no sets on ranks other than the writer's stage.
        """
        drawn = self._draw(sets, length=self.args.seq_length)
        check_samples(drawn, minimum=2)
        model, report = self._open_model(directory)
        report["sets"] = {}
        for name, samples in drawn.items():
            scores = score_samples(model, samples, args=self.args, eod=self.eod, bos=self.bos)
            if scores is not None:
                _check_finite(scores.loss, directory, name)
                report["sets"][name] = {
                    "loss": scores.loss.tolist(),
                    "probability": scores.probability.tolist(),
                    "tokens": scores.tokens.tolist(),
                    "corpus_perplexity": scores.corpus_perplexity,
                }
        return report

    def embeddings(
        self, directory: str, sets: Mapping[str, str]
    ) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """Embeddings of the samples of every set under a checkpoint.

        Args:
            directory: checkpoint directory, or an iteration of it.
            sets: dataset prefix of each set.

        Returns:
            What the model is, and for each set fp32 ``[N, H]``; no sets on ranks other than the writer's
            stage.
        """
        drawn = self._draw(sets, length=self.args.seq_length - 1)
        check_samples(drawn, minimum=MIN_SAMPLES)
        model, report = self._open_model(directory)
        found = {}
        for name, samples in drawn.items():
            embedded = embed_samples(model, samples, args=self.args, eod=self.eod, bos=self.bos)
            if embedded is not None:
                found[name] = embedded
        return report, found

    def _open_model(self, directory: str) -> tuple[FrozenModel, dict[str, Any]]:
        """Load a checkpoint; the model, and what it is."""
        checkpoint = open_named(directory, flag="--checkpoint")
        check_architecture(checkpoint, self.args, flag="--checkpoint")
        trained, computed = precision(checkpoint.args), precision(self.args)
        if trained != computed and self.is_writer:
            logger.warning(
                "%s was trained in %s and is computed in %s, as --checkpoint %s is",
                *(directory, trained, computed, self.options.checkpoint[0]),
            )
        with console.hidden():
            model = FrozenModel(
                self.model_config, args=self.args, checkpoint=checkpoint, flag="--checkpoint"
            )
        names = dict(
            zip(self.options.checkpoint, short_names(self.options.checkpoint), strict=True)
        )
        return model, {
            "label": names[directory],
            "iteration": checkpoint.iteration,
            "digest": model.digest,
            "computed_in": computed,
            "run": record_run(checkpoint),
        }

    def _draw(self, sets: Mapping[str, str], *, length: int) -> dict[str, list[np.ndarray]]:
        """The samples of every set, read before any model is."""
        for prefix in sets.values():
            check_prefix(
                prefix,
                vocab_size=self.args.unpadded_vocab_size,
                tokenizer_digest=self.args.tokenizer_digest,
            )
        count, seed = self.options.samples, self.options.seed
        return {
            name: read_samples(prefix, count=count, length=length, seed=seed)
            for name, prefix in sets.items()
        }


def precision(args: Namespace) -> str:
    """What a run computes in, by its arguments."""
    chosen = (name for name in ("bf16", "fp16") if getattr(args, name, False))
    return next(chosen, "fp32")


def _check_finite(loss: np.ndarray, directory: str, name: str) -> None:
    """Refuse what no mean, no interval and no JSON file could hold, before more sets are scored."""
    broken = np.count_nonzero(~np.isfinite(loss))
    if broken:
        raise CheckpointError(
            f"--checkpoint {directory}: expected finite losses, found {broken} of {len(loss)} samples of "
            f"{name} that are not"
        )


@contextlib.contextmanager
def open_session(
    options: Namespace, checkpoint: Checkpoint, *, length: int | None = None
) -> Iterator[Session]:
    """Set Megatron up for the architecture of a checkpoint, behind `compat.apply`.

    Args:
        options: ``tokenizer_type``, ``tokenizer_model``, ``micro_batch_size``,
            ``tensor_model_parallel_size``, ``pipeline_model_parallel_size``; for what a session measures
            also ``checkpoint``, ``samples``, ``seed``.
        checkpoint: the first of the models.
        length: tokens of a sequence, if fewer than the model's: text is padded to it.

    Raises:
        ConfigError: Megatron refuses the settings.
    """
    from megatron.training import get_tokenizer
    from megatron.training import training as loop
    from megatron.training.global_vars import set_global_variables

    with console.hidden():
        args = _arguments(options, checkpoint, length)
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
        yield Session(args, options, model_config, eod=tokenizer.eod, bos=bos)
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
