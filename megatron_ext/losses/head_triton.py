"""Triton's side of the unlearning head: drop-in replacements for the functions of `vocab_parallel`.

Legend: N tokens, V columns of this shard. Imported only where Triton is used. These are the kernels
that were run and measured on a GPU; those in `benchmarks/candidate` are to replace them once they have been.
Products and sums may be fused, whatever Triton's default: it changes in 3.10, and with it speed and last
digits would.
"""

import math

import torch
import triton
from torch import Tensor

from megatron_ext.losses.head_kernels import divergence_kernel, gradient_kernel, margin_kernel
from megatron_ext.losses.vocab_parallel import RowStatistics, combine_statistics

__all__ = ["combine_statistics", "logits_gradient", "shard_statistics"]

# Columns that a program takes at once, at most.
MARGIN_BLOCK = 8192
DIVERGENCE_BLOCK = 4096
GRADIENT_BLOCK = 4096


def shard_statistics(
    logits: Tensor,
    labels: Tensor,
    *,
    vocab_start: int,
    valid_columns: int,
    reference_logits: Tensor | None = None,
) -> Tensor:
    """As `vocab_parallel.shard_statistics`; `[2, N]` or, with a reference, `[5, N]` fp64."""
    tokens = logits.shape[0]
    assert logits.stride(1) == 1
    fields = 2 if reference_logits is None else 5
    stats = logits.new_empty(fields, tokens, dtype=torch.float64)
    if tokens == 0:
        return stats
    if reference_logits is None:
        margin_kernel[(tokens,)](
            logits,
            labels,
            stats,
            logits.stride(0),
            stats.stride(0),
            vocab_start,
            valid_columns,
            BLOCK=_block(valid_columns, MARGIN_BLOCK),
            num_warps=8,
            enable_fp_fusion=True,
        )
        return stats
    assert reference_logits.stride(1) == 1
    divergence_kernel[(tokens,)](
        logits,
        reference_logits,
        labels,
        stats,
        logits.stride(0),
        reference_logits.stride(0),
        stats.stride(0),
        vocab_start,
        valid_columns,
        BLOCK=_block(valid_columns, DIVERGENCE_BLOCK),
        num_warps=8,
        enable_fp_fusion=True,
    )
    return stats


def logits_gradient(
    logits: Tensor,
    labels: Tensor,
    rows: RowStatistics,
    grad_margin: Tensor | None,
    grad_kl: Tensor | None,
    *,
    vocab_start: int,
    valid_columns: int,
    reference_logits: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """As `vocab_parallel.logits_gradient`; `out` may be `logits`."""
    tokens, columns = logits.shape
    out = torch.empty_like(logits) if out is None else out
    assert logits.stride(1) == 1
    assert out.stride(1) == 1
    if tokens == 0:
        return out
    unused = rows.lse_rest
    with_kl = grad_kl is not None
    reference = reference_logits if with_kl else logits
    assert reference is not None
    block = _block(columns, GRADIENT_BLOCK)
    gradient_kernel[(tokens, math.ceil(columns / block))](
        logits,
        reference,
        out,
        labels,
        rows.margin,
        rows.lse_rest,
        rows.lse_z if with_kl else unused,
        rows.lse_t if with_kl else unused,
        grad_margin.contiguous() if grad_margin is not None else unused,
        grad_kl.contiguous() if grad_kl is not None else unused,
        logits.stride(0),
        reference.stride(0),
        out.stride(0),
        vocab_start,
        valid_columns,
        columns,
        BLOCK=block,
        WITH_MARGIN=grad_margin is not None,
        WITH_KL=with_kl,
        num_warps=8,
        enable_fp_fusion=True,
    )
    return out


def _block(columns: int, limit: int) -> int:
    """Columns a program takes at once: a power of two."""
    return min(limit, max(16, triton.next_power_of_2(columns)))
