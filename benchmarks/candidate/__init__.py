"""Kernels that are to replace those of `megatron_ext.losses.head_triton`: the same functions.

Legend: N tokens, V columns of this shard. Imported only where Triton is used.

Faster on paper (benchmarks/NOTES.md), tested under Triton's interpreter and compiled for sm_80 and sm_90a,
but not yet run on a GPU. No flag of the product reaches them; `unlearning_head(..., backend=candidate)` does,
given this module. Products and sums are fused as there.
"""

import torch
import triton
from torch import Tensor

from benchmarks.candidate.gradient import gradient_kernel
from benchmarks.candidate.joins import combine_kernel, finish_kernel
from benchmarks.candidate.kernels import WIDTH, divergence_kernel, margin_kernel
from megatron_ext.losses.vocab_parallel import RowStatistics

# Warps of a program, and loads (of a thread's `WIDTH` columns, a matrix) under way at a time. Margins of fp32
# logits take half as many, the same bytes: with 4, Triton 3.7 spills registers on sm_80.
MARGIN_WARPS, MARGIN_LOADS = 4, 4
DIVERGENCE_WARPS, DIVERGENCE_LOADS = 4, 2
# Columns of a program's tile, its warps, and its tiles.
GRADIENT_BLOCK, GRADIENT_WARPS, GRADIENT_TILES = 1024, 4, 16
# Rows of a program that joins statistics.
JOIN_ROWS = 64


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
    if tokens == 0:
        return logits.new_empty(2 if reference_logits is None else 5, 0, dtype=torch.float64)
    if reference_logits is None:
        stats = logits.new_empty(2, tokens, dtype=torch.float64)
        margin_loads = max(1, MARGIN_LOADS * 2 // logits.element_size())
        margin_kernel[(tokens,)](
            logits,
            labels,
            stats,
            logits.stride(0),
            tokens,
            vocab_start,
            valid_columns,
            LANES=32 * MARGIN_WARPS,
            LOADS=_loads(valid_columns, MARGIN_WARPS, margin_loads),
            num_warps=MARGIN_WARPS,
            enable_fp_fusion=True,
        )
        return stats
    assert reference_logits.stride(1) == 1
    sums = logits.new_empty(8, tokens, dtype=torch.float32)
    divergence_kernel[(tokens,)](
        logits,
        reference_logits,
        labels,
        sums,
        logits.stride(0),
        reference_logits.stride(0),
        tokens,
        vocab_start,
        valid_columns,
        LANES=32 * DIVERGENCE_WARPS,
        LOADS=_loads(valid_columns, DIVERGENCE_WARPS, DIVERGENCE_LOADS),
        num_warps=DIVERGENCE_WARPS,
        enable_fp_fusion=True,
    )
    stats = logits.new_empty(5, tokens, dtype=torch.float64)
    finish_kernel[(triton.cdiv(tokens, JOIN_ROWS),)](
        sums, stats, tokens, BLOCK=JOIN_ROWS, num_warps=2, enable_fp_fusion=True
    )
    return stats


def combine_statistics(gathered: Tensor) -> RowStatistics:
    """As `vocab_parallel.combine_statistics`, in one launch."""
    tp, fields, tokens = gathered.shape
    margin, kl = gathered.new_empty(2, tokens, dtype=torch.float32)
    lse = gathered.new_empty(1 if fields == 2 else 3, tokens)
    if tokens:
        combine_kernel[(triton.cdiv(tokens, JOIN_ROWS),)](
            gathered.contiguous(),
            margin,
            kl,
            lse,
            tokens,
            tp,
            FIELDS=fields,
            BLOCK=JOIN_ROWS,
            num_warps=2,
            enable_fp_fusion=True,
        )
    if fields == 2:
        return RowStatistics(margin, kl, lse[0], None, None)
    return RowStatistics(margin, kl, lse[0], lse[1], lse[2])


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
    block = min(GRADIENT_BLOCK, max(16, triton.next_power_of_2(columns)))
    gradient_kernel[(tokens, triton.cdiv(columns, block * GRADIENT_TILES))](
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
        TILES=GRADIENT_TILES,
        WITH_MARGIN=grad_margin is not None,
        WITH_KL=with_kl,
        num_warps=GRADIENT_WARPS,
        enable_fp_fusion=True,
    )
    return out


def _loads(columns: int, warps: int, limit: int) -> int:
    """Loads under way at a time: a power of two, fewer where a row is short."""
    whole = max(1, columns // (32 * warps * WIDTH.value))
    return min(limit, 1 << (whole.bit_length() - 1))
