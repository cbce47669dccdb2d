"""Row statistics and logit gradients of a vocabulary-sharded softmax.

The functional core of the losses and of the fused head: what one shard of the vocabulary
contributes to a token's margin and KL, how the contributions of all shards are joined, and the
gradient of a shard's logits given the joined result. Nothing here knows of autograd or Megatron.

Legend: N tokens, V columns of this shard, tp shards. With `z` the logits, `t` the reference logits
and `y` the label, over the columns of one shard or of all:

    lse_rest = ln sum_{j != y} exp z_j      lse_z = ln sum_j exp z_j      lse_t = ln sum_j exp t_j
    margin = z_y - lse_rest                 KL = sum_j p_t(j) (ln p_t(j) - ln p_z(j))

Shards are joined by the chain rule of KL: with P^r = exp(lse^r - lse) the mass of shard r and KL^r
the divergence of the distributions conditional on it,

    KL = sum_r P_t^r (KL^r + ln P_t^r - ln P_z^r)

Therefore one gather of a few numbers a token serves margin and KL; no maximum has to be agreed on first.

Precision. A margin needs fp32 only: `exp(z - max)` has a relative error of 1e-6 at most where it
matters. A divergence, and its gradient `p_z - p_t`, subtract numbers that are nearly equal when the
student is near the reference; with a reference the arithmetic is fp64, block by block, so that
neither cancels. On one thread of a CPU, margin and KL, forward and backward, so take 5.5 ns a logit
where autograd through fp32 `log_softmax` takes 16; an fp64 exponential takes 0.5 ns, an fp32 one 0.2.

What is kept for each row is always fp64: it is a few numbers a token, and `z - lse` then loses nothing
to an offset of the logits up to 1e10. Beyond, the log of the sum drowns in the maximum: results stay
finite, but a tie of such logits is not resolved. A NaN or +inf makes all that depends on it NaN.
"""

import math
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_ext.losses.blocks import (
    exp_difference,
    label_columns,
    logsumexp_,
    no_statistics,
    own_copy,
    row_blocks,
    work_dtype,
)


@dataclass(frozen=True, slots=True)
class RowStatistics:
    """What the whole vocabulary says of each token; identical on all ranks of the group.

    Attributes:
        margin: `[N]` fp32, finite for finite logits. Without labels it means nothing.
        kl: `[N]` fp32, as finite, non-negative; zeros without a reference.
        lse_rest: `[N]` fp64, over all columns but the label's (all columns without labels).
        lse_z: `[N]` fp64, over all columns; None without a reference.
        lse_t: `[N]` fp64, of the reference; None without a reference.
    """

    margin: Tensor
    kl: Tensor
    lse_rest: Tensor
    lse_z: Tensor | None
    lse_t: Tensor | None


def shard_columns(
    columns: int, *, vocab_size: int | None, group: dist.ProcessGroup | None
) -> tuple[int, int]:
    """Finds this rank's place in the vocabulary.

    Args:
        columns: V, the columns of this rank's shard; the same on all ranks.
        vocab_size: Real columns over all shards, the rest is padding; None if none is padding.
        group: Ranks that hold the shards, in order; None if the logits are whole.

    Returns:
        Global id of the first column, and how many of the columns are not padding.

    Raises:
        ValueError: `vocab_size` is not in 1..V * tp.
    """
    rank, size = (dist.get_rank(group), dist.get_world_size(group)) if group else (0, 1)
    total = columns * size
    if vocab_size is None:
        vocab_size = total
    if not 1 <= vocab_size <= total:
        raise ValueError(
            f"vocab_size must be in 1..{total} ({size} shard(s) of {columns} columns), "
            f"got {vocab_size}"
        )
    start = rank * columns
    return start, min(max(vocab_size - start, 0), columns)


def check_labels(labels: Tensor, *, vocab_size: int) -> None:
    """Refuses labels outside the vocabulary, also at positions that the caller will ignore.

    The test is against the whole vocabulary and the labels are the same on all ranks of a group, so
    that all of them raise, and none waits for another in a collective.

    On CUDA nothing is read back: a bad label fails a device-side assertion, which surfaces as a
    RuntimeError at the next synchronisation.

    Args:
        labels: `[...]` integers, global ids.
        vocab_size: Real columns over all shards.

    Raises:
        TypeError: `labels` are not integers.
        ValueError: A label is out of range (CPU).
    """
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise TypeError(f"labels must be integers, got {labels.dtype}")
    valid = (labels >= 0) & (labels < vocab_size)
    if labels.is_cuda:
        torch._assert_async(valid.all(), f"a label is outside 0..{vocab_size - 1}")
    elif not valid.all():
        position = tuple((~valid).nonzero()[0].tolist())
        raise ValueError(
            f"labels must be in 0..{vocab_size - 1}, got {labels[position].item()} "
            f"at position {position}"
        )


def shard_statistics(
    logits: Tensor,
    labels: Tensor | None,
    *,
    vocab_start: int,
    valid_columns: int,
    reference_logits: Tensor | None = None,
) -> Tensor:
    """Reduces one shard of the vocabulary to a few numbers a token.

    Args:
        logits: `[N, V]` of any float type; not changed.
        labels: `[N]` global ids, in this shard or not; None if no margin is wanted.
        vocab_start: Global id of column 0.
        valid_columns: Columns from here on are padding and not read; may be 0.
        reference_logits: `[N, V]` of any float type, or None.

    Returns:
        `[2, N]` fp64: `z_y` (-inf if the label is not here) and `lse_rest` (-inf if there is no
        other column); with a reference `[5, N]`: also `lse_z`, `lse_t` and the KL of the
        distributions conditional on this shard.
    """
    has_reference = reference_logits is not None
    stats = no_statistics(5 if has_reference else 2, logits.shape[0], device=logits.device)
    if valid_columns == 0:
        return stats
    if labels is not None:
        column, inside = label_columns(labels, vocab_start, valid_columns)
    work = work_dtype(logits, has_reference)
    for rows in row_blocks(logits):
        z = own_copy(logits[rows, :valid_columns], work)
        if reference_logits is not None:
            t = own_copy(reference_logits[rows, :valid_columns], work)
            difference = t - z
            stats[3, rows], exp_t, total_t = logsumexp_(t)
            mean_difference = exp_t.mul_(difference).sum(-1) / total_t
        if labels is not None:
            z_y = z.gather(-1, column[rows])
            stats[0, rows] = torch.where(inside[rows], z_y, -math.inf).squeeze(-1).double()
            z.scatter_(-1, column[rows], torch.where(inside[rows], -math.inf, z_y))
        stats[1, rows] = logsumexp_(z)[0]
        if reference_logits is not None:
            stats[2, rows] = torch.logaddexp(stats[0, rows], stats[1, rows])
            stats[4, rows] = mean_difference - stats[3, rows] + stats[2, rows]
    return stats


def gather_statistics(stats: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Brings the statistics of all shards to every rank, in one collective.

    Args:
        stats: `[R, N]`, from `shard_statistics`.
        group: Ranks that hold the shards; None if the logits are whole.

    Returns:
        `[tp, R, N]` in the order of the ranks.
    """
    size = dist.get_world_size(group) if group else 1
    if size == 1:
        return stats.unsqueeze(0)
    gathered = stats.new_empty((size * stats.shape[0], *stats.shape[1:]))
    dist.all_gather_into_tensor(gathered, stats.contiguous(), group=group)
    return gathered.view(size, *stats.shape)


def join_statistics(parts: Tensor) -> Tensor:
    """Joins the statistics of neighbouring parts of the vocabulary to those of one part.

    Args:
        parts: `[P, R, N]` fp64, each from `shard_statistics`.

    Returns:
        `[R, N]`, what `shard_statistics` says of all their columns.
    """
    joined = torch.empty_like(parts[0])
    joined[0] = parts[:, 0].amax(0)
    joined[1:4] = torch.logsumexp(parts[:, 1:4], 0)
    if parts.shape[1] == 2:
        return joined
    lse_z, lse_t = joined[2], joined[3]
    mass_t = (parts[:, 3] - lse_t).exp()
    # A part of padding has no mass on either side: its ratio is inf - inf, its share is 0.
    log_ratio = (parts[:, 3] - lse_t) - (parts[:, 2] - lse_z)
    joined[4] = torch.where(mass_t == 0, 0.0, mass_t * (parts[:, 4] + log_ratio)).sum(0)
    return joined


def combine_statistics(gathered: Tensor) -> RowStatistics:
    """Joins the statistics of all shards.

    Args:
        gathered: `[tp, R, N]` fp64, from `gather_statistics`.

    Returns:
        The statistics over the whole vocabulary. Margin and KL are held to the range of fp32, which
        only logits at the very ends of that range can leave.
    """
    largest = torch.finfo(torch.float32).max
    z_y, lse_rest, *with_reference = join_statistics(gathered)
    margin = (z_y - lse_rest).clamp(-largest, largest).float()
    margin.masked_fill_(z_y == math.inf, math.nan)  # it overflowed, and is not certain
    if not with_reference:
        return RowStatistics(margin, torch.zeros_like(margin), lse_rest, None, None)
    lse_z, lse_t, kl = with_reference
    return RowStatistics(margin, kl.clamp(0.0, largest).float(), lse_rest, lse_z, lse_t)


def logits_gradient(
    logits: Tensor,
    labels: Tensor | None,
    rows: RowStatistics,
    grad_margin: Tensor | None,
    grad_kl: Tensor | None,
    *,
    vocab_start: int,
    valid_columns: int,
    reference_logits: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Gradient of one shard's logits; local, no communication.

    `grad_margin * (onehot_y - softmax_rest) + grad_kl * (p_z - p_t)`, where `softmax_rest` is the
    softmax over the columns other than the label's. Each part is computed as it stands, not from
    the full softmax: subtracting `p` from 1 would lose the gradient of an almost certain token.

    Args:
        logits: `[N, V]`, as given to `shard_statistics`.
        labels: `[N]`, as given to `shard_statistics`; needed with `grad_margin`.
        rows: Statistics over the whole vocabulary.
        grad_margin: `[N]` gradient of the margins; None if there is none.
        grad_kl: `[N]` gradient of the divergences; None if there is none.
        vocab_start: Global id of column 0.
        valid_columns: Columns from here on are padding; their gradient is 0.
        reference_logits: `[N, V]`; needed with `grad_kl`.
        out: `[N, V]` to write to, rounded to its type; may be `logits` itself. None allocates it
            in the type of `logits`.

    Returns:
        `out`.
    """
    if out is None:
        out = torch.empty_like(logits)
    out[:, valid_columns:] = 0
    if valid_columns == 0:
        return out
    # d/dz_j is at_rest * softmax_rest(j) - grad_kl * p_t(j), but at the label at_label instead of
    # the first product: elsewhere p_z is softmax_rest, scaled to the mass of the rest.
    at_rest = at_label = torch.zeros_like(rows.lse_rest)
    if labels is not None:
        column, inside = label_columns(labels, vocab_start, valid_columns)
    if grad_margin is not None:
        at_rest, at_label = at_rest - grad_margin, at_label + grad_margin
    if grad_kl is not None:
        assert rows.lse_z is not None
        at_rest = at_rest + grad_kl * (rows.lse_rest - rows.lse_z).exp()
        if labels is not None:
            z_y = logits.gather(-1, column).squeeze(-1)
            at_label = at_label + grad_kl * (z_y - rows.lse_z).exp()
    work = work_dtype(logits, grad_kl is not None)
    for block in row_blocks(logits):
        gradient = exp_difference(logits[block, :valid_columns], rows.lse_rest[block], work)
        gradient *= at_rest[block, None].to(work)
        if labels is not None:
            # Replaced, not adjusted: the exponential of the label is exp(margin), perhaps inf.
            other = gradient.gather(-1, column[block])
            label = torch.where(inside[block], at_label[block, None].to(work), other)
            gradient.scatter_(-1, column[block], label)
        if grad_kl is not None:
            assert reference_logits is not None
            assert rows.lse_t is not None
            p_t = exp_difference(reference_logits[block, :valid_columns], rows.lse_t[block], work)
            gradient.addcmul_(p_t, grad_kl[block, None].to(work), value=-1)
        out[block, :valid_columns] = gradient
    return out
