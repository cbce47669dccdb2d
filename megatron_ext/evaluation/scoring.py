"""Log-probabilities of given tokens.

Shapes: `...` positions and rows, V tokens of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_ext.evaluation.sampling import Scored


def label_scores(logits: Tensor, labels: Tensor) -> Tensor:
    """What a model thinks of the tokens that come next.

    Args:
        logits: `[..., V]`, any precision.
        labels: int64 `[...]`.

    Returns:
        fp64 `[..., 2]`: log-probability of the label in nats, and 1 where it is the most probable token.
    """
    logits = logits.float()
    own = logits.gather(-1, labels[..., None])[..., 0]
    greedy = logits.argmax(dim=-1) == labels
    return torch.stack([(own - logits.logsumexp(dim=-1)).double(), greedy.double()], dim=-1)


def rows_to_score(sequences: Sequence[Scored], *, rows: int) -> tuple[Tensor, Tensor]:
    """Lay sequences out for a forward pass.

    Args:
        sequences: at most `rows`.
        rows: b; rows beyond the sequences are padding.

    Returns:
        Tokens, int64 `[b, s + 1]`, padded with 0; and which of the labels `tokens[:, 1:]` count,
        bool `[b, s]`.
    """
    width = max(len(sequence.tokens) for sequence in sequences)
    tokens = torch.zeros(rows, width, dtype=torch.int64)
    counts = torch.zeros(rows, width - 1, dtype=torch.bool)
    for row, sequence in enumerate(sequences):
        tokens[row, : len(sequence.tokens)] = torch.tensor(sequence.tokens)
        counts[row, sequence.start - 1 : len(sequence.tokens) - 1] = True
    return tokens, counts


def sum_scores(scores: Tensor, counts: Tensor) -> list[tuple[float, bool]]:
    """Sums over the tokens of each row.

    Args:
        scores: fp64 `[b, s, 2]`, of `label_scores`.
        counts: bool `[b, s]`, which tokens count.

    Returns:
        For each row the sum of log-probabilities, and whether all tokens are the most probable ones.
    """
    sums = (scores[..., 0] * counts).sum(dim=1).tolist()
    greedy = ((scores[..., 1] == 1) | ~counts).all(dim=1).tolist()
    return list(zip(sums, greedy, strict=True))
