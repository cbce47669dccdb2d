"""Margin and reference KL of every token, with one collective for both.

Source: arXiv 2406.12397. The paper states its objectives over probabilities; here each of them is a
function of the target margin (`objectives.py`), which is exact at both ends of the range of p.
"""

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_ext.losses.vocab_parallel import (
    RowStatistics,
    check_labels,
    combine_statistics,
    gather_statistics,
    logits_gradient,
    shard_columns,
    shard_statistics,
)


class Terms(NamedTuple):
    """What every objective is made of.

    Attributes:
        margin: `[...]` fp32, the log-odds of the label: `z_y - ln sum_{j != y} exp z_j`.
        kl: `[...]` fp32, `KL(p_reference || p)` in nats; zeros without a reference.
    """

    margin: Tensor
    kl: Tensor


def unlearning_terms(
    logits: Tensor,
    labels: Tensor,
    *,
    reference_logits: Tensor | None = None,
    tp_group: dist.ProcessGroup | None = None,
    vocab_size: int | None = None,
) -> Terms:
    """Target margin and reference KL of every token.

    One all-gather of 2 (with a reference 5) fp64 numbers a token; no communication in backward.
    The results are the same on all ranks of the group, and a loss made of them gives each rank the
    gradient of its own shard. Logits with contiguous leading dimensions are not copied.

    Args:
        logits: `[..., V / tp]` of any float type, finite in fp32. Not changed.
        labels: `[...]` integers, global ids, the same on all ranks. They must be valid everywhere:
            to ignore a position is the caller's business.
        reference_logits: `[..., V / tp]` of any float type, finite in fp32; gets no gradient.
        tp_group: Ranks that hold the shards of the vocabulary, in order. None: the logits are
            whole, whatever process groups exist.
        vocab_size: Real columns over all shards; the columns from there on are padding, take no
            part in any term and get a gradient of 0. None: no padding.

    Returns:
        Margin and KL, differentiable in `logits`, once.

    Raises:
        TypeError: Logits are not floating point or labels not integers.
        ValueError: Shapes do not fit, `vocab_size` does not fit the shards, a label is out of range
            (on CUDA a device-side assertion, so as not to wait for the device), or the vocabulary
            has one column only: the margin is then the log-odds of a certainty.
    """
    _check_floating(logits=logits, reference_logits=reference_logits)
    if labels.shape != logits.shape[:-1]:
        raise ValueError(
            f"labels must have the shape {tuple(logits.shape[:-1])} of the logits' rows, "
            f"got {tuple(labels.shape)}"
        )
    size = dist.get_world_size(tp_group) if tp_group else 1
    total = logits.shape[-1] * size if vocab_size is None else vocab_size
    if total < 2:
        raise ValueError(f"a target margin needs a vocabulary of at least 2 columns, got {total}")
    check_labels(labels, vocab_size=total)
    return _terms(logits, labels, reference_logits, tp_group, vocab_size)


def divergence_terms(
    logits: Tensor,
    reference_logits: Tensor,
    *,
    tp_group: dist.ProcessGroup | None = None,
    vocab_size: int | None = None,
) -> Tensor:
    """The `kl` of `unlearning_terms` where there are no labels; arguments and errors as there."""
    _check_floating(logits=logits, reference_logits=reference_logits)
    return _terms(logits, None, reference_logits, tp_group, vocab_size).kl


def _check_floating(*, logits: Tensor, reference_logits: Tensor | None) -> None:
    for name, tensor in (("logits", logits), ("reference_logits", reference_logits)):
        if tensor is not None and not tensor.is_floating_point():
            raise TypeError(f"{name} must be floating point, got {tensor.dtype}")
    if logits.dim() == 0 or logits.shape[-1] == 0:
        raise ValueError(f"logits need at least one column, got shape {tuple(logits.shape)}")
    if reference_logits is not None and reference_logits.shape != logits.shape:
        raise ValueError(
            f"reference_logits must have the logits' shape {tuple(logits.shape)}, "
            f"got {tuple(reference_logits.shape)}"
        )


def _terms(
    logits: Tensor,
    labels: Tensor | None,
    reference_logits: Tensor | None,
    group: dist.ProcessGroup | None,
    vocab_size: int | None,
) -> Terms:
    """Flattens the tokens, applies the autograd function, restores their shape."""
    shape, columns = logits.shape[:-1], logits.shape[-1]
    start, valid = shard_columns(columns, vocab_size=vocab_size, group=group)
    margin, kl = _VocabParallelTerms.apply(
        logits.reshape(-1, columns),
        None if labels is None else labels.reshape(-1),
        None if reference_logits is None else reference_logits.detach().reshape(-1, columns),
        group,
        start,
        valid,
    )
    return Terms(margin.view(shape), kl.view(shape))


class _VocabParallelTerms(torch.autograd.Function):
    """The hand-written derivative: autograd through a collective would not know of the shards."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        labels: Tensor | None,
        reference_logits: Tensor | None,
        group: dist.ProcessGroup | None,
        vocab_start: int,
        valid_columns: int,
    ) -> tuple[Tensor, Tensor]:
        """`[N, V]`, `[N]`, `[N, V]` to margin and KL, `[N]` each."""
        stats = shard_statistics(
            logits,
            labels,
            vocab_start=vocab_start,
            valid_columns=valid_columns,
            reference_logits=reference_logits,
        )
        rows = combine_statistics(gather_statistics(stats, group))
        ctx.save_for_backward(
            logits,
            labels,
            reference_logits,
            rows.margin,
            rows.kl,
            rows.lse_rest,
            rows.lse_z,
            rows.lse_t,
        )
        ctx.columns = (vocab_start, valid_columns)
        ctx.set_materialize_grads(False)
        if reference_logits is None:
            ctx.mark_non_differentiable(rows.kl)
        if labels is None:
            ctx.mark_non_differentiable(rows.margin)
        return rows.margin, rows.kl

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_margin: Tensor | None, grad_kl: Tensor | None) -> tuple[Any, ...]:
        """Gradient of the shard's logits."""
        logits, labels, reference_logits, *rows = ctx.saved_tensors
        vocab_start, valid_columns = ctx.columns
        gradient = logits_gradient(
            logits,
            labels,
            RowStatistics(*rows),
            None if labels is None else grad_margin,
            None if reference_logits is None else grad_kl,
            vocab_start=vocab_start,
            valid_columns=valid_columns,
            reference_logits=reference_logits,
        )
        return gradient, None, None, None, None, None
