"""The target margin: the log-odds of a token's label."""

import torch.distributed as dist
from torch import Tensor

from megatron_ext.losses.terms import unlearning_terms


def target_margin(
    logits: Tensor,
    labels: Tensor,
    *,
    tp_group: dist.ProcessGroup | None = None,
    vocab_size: int | None = None,
) -> Tensor:
    """Log-odds of each label, `z_y - ln sum_{j != y} exp z_j = ln p(y) - ln(1 - p(y))`.

    Its derivative is 1 in `z_y` and `-softmax_rest(j)` in `z_j`: a softmax over the other columns.

    Args:
        logits: `[..., V / tp]` of any float type, finite. Not changed.
        labels: `[...]` integers, global ids, the same on all ranks.
        tp_group: Ranks that hold the shards of the vocabulary; None if the logits are whole.
        vocab_size: Real columns over all shards; those from there on are padding.

    Returns:
        `[...]` fp32, differentiable.

    Raises:
        TypeError, ValueError: As `unlearning_terms`.
    """
    return unlearning_terms(logits, labels, tp_group=tp_group, vocab_size=vocab_size).margin
