"""Perplexities and embeddings of sets of samples under checkpoints."""

from __future__ import annotations

import logging
from argparse import Namespace
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_ext.analysis.embeddings import MIN_SAMPLES
from megatron_ext.analysis.forward import embed_samples
from megatron_ext.analysis.perplexity import score_samples
from megatron_ext.analysis.records import record_run
from megatron_ext.analysis.samples import check_samples, read_samples
from megatron_ext.checkpoint.inspect import check_architecture
from megatron_ext.checkpoint.named import open_named, short_names
from megatron_ext.data.manifest import check_prefix
from megatron_ext.exceptions import CheckpointError
from megatron_ext.frozen import FrozenModel
from megatron_ext.runtime import console
from megatron_ext.session import Session

logger = logging.getLogger(__name__)


@dataclass
class Analysis:
    """What is measured of models that have one architecture.

    Attributes:
        session: Megatron, set up for it.
        options: the tool's own: ``checkpoint``, ``samples``, ``seed``.
    """

    session: Session
    options: Namespace

    @property
    def is_writer(self) -> bool:
        """Whether this rank holds the results and writes them."""
        return self.session.is_writer

    def check_models(self) -> None:
        """Open all checkpoints, without their tensors, and compare them before any of them is run.

        Raises:
            CheckpointError: one cannot be read, or is of another architecture, vocabulary or tokenizer than
                the first.
        """
        for directory in self.options.checkpoint:
            checkpoint = open_named(directory, flag="--checkpoint")
            check_architecture(checkpoint, self.session.args, flag="--checkpoint")

    def perplexities(self, directory: str, sets: Mapping[str, str]) -> dict[str, Any]:
        """Per-sample scores of every set under a checkpoint.

        Args:
            directory: checkpoint directory, or an iteration of it.
            sets: dataset prefix of each set.

        Returns:
            What the model is, and for each set the loss, mean probability and number of tokens of every
            sample; no sets on ranks other than the writer's stage.
        """
        drawn = self._draw(sets, length=self.session.args.seq_length)
        check_samples(drawn, minimum=2)
        model, report = self._open_model(directory)
        report["sets"] = {}
        for name, samples in drawn.items():
            scores = score_samples(model, samples, **self._of_model())
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
        drawn = self._draw(sets, length=self.session.args.seq_length - 1)
        check_samples(drawn, minimum=MIN_SAMPLES)
        model, report = self._open_model(directory)
        found = {}
        for name, samples in drawn.items():
            embedded = embed_samples(model, samples, **self._of_model())
            if embedded is not None:
                found[name] = embedded
        return report, found

    def _of_model(self) -> dict[str, Any]:
        return {"args": self.session.args, "eod": self.session.eod, "bos": self.session.bos}

    def _open_model(self, directory: str) -> tuple[FrozenModel, dict[str, Any]]:
        """Load a checkpoint; the model, and what it is."""
        checkpoint = open_named(directory, flag="--checkpoint")
        check_architecture(checkpoint, self.session.args, flag="--checkpoint")
        trained, computed = precision(checkpoint.args), precision(self.session.args)
        if trained != computed and self.is_writer:
            logger.warning(
                "%s was trained in %s and is computed in %s, as --checkpoint %s is",
                *(directory, trained, computed, self.options.checkpoint[0]),
            )
        with console.hidden():
            model = FrozenModel(
                self.session.model_config,
                args=self.session.args,
                checkpoint=checkpoint,
                flag="--checkpoint",
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
                vocab_size=self.session.args.unpadded_vocab_size,
                tokenizer_digest=self.session.args.tokenizer_digest,
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
