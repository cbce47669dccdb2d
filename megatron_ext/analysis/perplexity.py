"""Per-sample perplexity of documents under a checkpoint, by the distributed model.

Source: figure 4 of arXiv 2406.12397, where a model trained on synthetic text shows a lower mean and a
smaller variance of the perplexity of instruction data.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from megatron.core import parallel_state

from megatron_ext.analysis.forward import final_states, in_order_of_length, text_starts
from megatron_ext.analysis.statistics import perplexity
from megatron_ext.data.batch import MicroBatch
from megatron_ext.frozen import FrozenModel
from megatron_ext.losses import cross_entropy


@dataclass(frozen=True)
class SampleScores:
    """Scores of the samples of one set under one model.

    Attributes:
        loss: fp64 ``[n]``, mean cross-entropy of a sample's tokens, in nats.
        probability: fp64 ``[n]``, mean probability of a sample's tokens.
        tokens: int64 ``[n]``, tokens that were scored.
    """

    loss: np.ndarray
    probability: np.ndarray
    tokens: np.ndarray

    @property
    def perplexity(self) -> np.ndarray:
        """fp64 ``[n]``, ``exp(loss)``."""
        return np.exp(self.loss)

    @property
    def corpus_perplexity(self) -> float:
        """Perplexity of the set as one text: every token counts once."""
        return float(perplexity(np.average(self.loss, weights=self.tokens)))


def score_samples(
    model: FrozenModel,
    samples: Sequence[np.ndarray],
    *,
    args: Namespace,
    eod: int,
    bos: int | None = None,
) -> SampleScores | None:
    """Score samples, each preceded by an end-of-document token as in training; every replica its share.

    A token with which the tokenizer begins a sample is read, and is none of those that are scored.

    Args:
        model: the model's chunks on this rank.
        samples: int64 token arrays of at most ``args.seq_length`` tokens; the same on every rank.
        args: Megatron's arguments: sequence length, micro-batch size.
        eod: id of the end-of-document token.
        bos: id of the token that begins texts, if the tokenizer has one.

    Returns:
        The scores of all samples on the last pipeline stage, ``None`` elsewhere.
    """

    def scores(mine: Sequence[np.ndarray]) -> list[np.ndarray | None]:
        starts = text_starts(mine, bos=bos)
        states = final_states(model, mine, args=args, eod=eod, starts=starts)
        found = [_score(model, hidden, batch) for batch, hidden in states]
        return [*torch.cat(found)[: len(mine)].numpy()] if found else [None] * len(mine)

    rows = in_order_of_length(samples, scores)
    if not parallel_state.is_pipeline_last_stage(ignore_virtual=True):
        return None
    loss, probability = np.stack([row for row in rows if row is not None]).T
    starts = text_starts(samples, bos=bos)
    tokens = np.array([len(s) - start for s, start in zip(samples, starts, strict=True)])
    return SampleScores(loss=loss, probability=probability, tokens=tokens)


def _score(model: FrozenModel, states: torch.Tensor, batch: MicroBatch) -> torch.Tensor:
    """Mean loss and mean probability of each sequence, fp64 ``[b, 2]`` on the CPU."""
    assert batch.labels is not None
    assert batch.loss_mask is not None
    rows, length = batch.labels.shape
    margins = model.margins(states, batch.labels, fp32_logits=False)
    margin = margins.view(length, rows).transpose(0, 1)
    mask = batch.loss_mask.double()
    count = mask.sum(dim=1).clamp(min=1)
    loss = (cross_entropy(margin).double() * mask).sum(dim=1) / count
    probability = (torch.sigmoid(margin).double() * mask).sum(dim=1) / count
    return torch.stack((loss, probability), dim=1).cpu()
