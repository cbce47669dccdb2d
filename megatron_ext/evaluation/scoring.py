"""Log-probabilities of given tokens.

Shapes: `...` positions and rows, V tokens of the vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor


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
