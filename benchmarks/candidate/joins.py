"""Triton kernels that join the statistics of the unlearning head, a thread a row, in fp64.

Each does in one launch what takes `vocab_parallel` some thirty. Legend: N tokens, tp vocabulary
shards.
"""

# Triton reads the signatures itself; annotations other than constexpr mean something else to it.
# mypy: allow-untyped-defs, allow-incomplete-defs

import triton
import triton.language as tl

_INF = tl.constexpr(float("inf"))
_LARGEST = tl.constexpr(3.4028234663852886e38)  # of fp32
_ALL = tl.constexpr(tl.PropagateNan.ALL)  # else a GPU drops one NaN of two numbers


@triton.jit
def _logaddexp(a, b):
    """ln(e^a + e^b); -inf if both are."""
    high = tl.maximum(a, b, _ALL)
    total = high + tl.log(1.0 + tl.exp(tl.minimum(a, b, _ALL) - high))
    return tl.where(high == -_INF, -_INF, total)


@triton.jit
def _share(lse_z, lse_t, kl, total_z, total_t):
    """What a set of columns adds to the KL of all: P (KL + ln P/Q), 0 without mass."""
    log_p = lse_t - total_t
    mass = tl.exp(log_p)
    return tl.where(mass == 0.0, 0.0, mass * (kl + (log_p - (lse_z - total_z))))


@triton.jit
def finish_kernel(
    sums_ptr,  # [8, N] fp32, from `divergence_kernel`
    out_ptr,  # [5, N] fp64: label logit, lse of the rest, lse of z, lse of t, KL
    tokens,
    BLOCK: tl.constexpr,
):
    """Statistics of a shard: its columns but the label's, and the label, joined as two sets."""
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = rows < tokens
    sums = sums_ptr + rows
    z_label = tl.load(sums, mask=mask, other=0.0).to(tl.float64)
    t_label = tl.load(sums + tokens, mask=mask, other=0.0).to(tl.float64)
    z_max = tl.load(sums + 2 * tokens, mask=mask, other=0.0).to(tl.float64)
    t_max = tl.load(sums + 3 * tokens, mask=mask, other=0.0).to(tl.float64)
    q_sum = tl.load(sums + 4 * tokens, mask=mask, other=1.0).to(tl.float64)
    p_sum = tl.load(sums + 5 * tokens, mask=mask, other=1.0).to(tl.float64)
    gain = tl.load(sums + 6 * tokens, mask=mask, other=0.0).to(tl.float64)
    moment = tl.load(sums + 7 * tokens, mask=mask, other=0.0).to(tl.float64)
    # Differences that leave fp32 make the moment inf - inf, or 0 * inf; a NaN of the logits, which
    # must stay one, is in the other sums as well.
    moment = tl.where((moment != moment) & (gain == gain), _LARGEST, moment)
    empty = q_sum == 0.0
    q_sum = tl.where(empty, 1.0, q_sum)
    p_sum = tl.where(empty, 1.0, p_sum)
    growth = gain / q_sum
    near = tl.abs(growth) < 0.3
    change = tl.where(near, tl.log(1.0 + growth), tl.log(p_sum) - tl.log(q_sum))
    lse_rest = tl.where(empty, -_INF, z_max + tl.log(q_sum))
    lse_rest_t = tl.where(empty, -_INF, lse_rest + (t_max - z_max) + change)
    kl_rest = moment / p_sum - change
    lse_z = _logaddexp(lse_rest, z_label)
    lse_t = _logaddexp(lse_rest_t, t_label)
    kl = _share(lse_rest, lse_rest_t, kl_rest, lse_z, lse_t)
    kl += _share(z_label, t_label, 0.0, lse_z, lse_t)
    out = out_ptr + rows
    tl.store(out, z_label, mask=mask)
    tl.store(out + tokens, lse_rest, mask=mask)
    tl.store(out + 2 * tokens, lse_z, mask=mask)
    tl.store(out + 3 * tokens, lse_t, mask=mask)
    tl.store(out + 4 * tokens, kl, mask=mask)


@triton.jit
def combine_kernel(
    gathered_ptr,  # [tp, fields, N] fp64
    margin_ptr,  # [N] fp32
    kl_ptr,  # [N] fp32
    lse_ptr,  # [1 or 3, N] fp64: of the rest; of z; of t
    tokens,
    tp,
    FIELDS: tl.constexpr,  # 2, or 5 with a reference
    BLOCK: tl.constexpr,
):
    """`vocab_parallel.combine_statistics`."""
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = rows < tokens
    z_label = tl.full([BLOCK], -_INF, tl.float64)
    lse_rest = tl.full([BLOCK], -_INF, tl.float64)
    lse_z = tl.full([BLOCK], -_INF, tl.float64)
    lse_t = tl.full([BLOCK], -_INF, tl.float64)
    for shard in range(tp):
        field = gathered_ptr + shard * FIELDS * tokens + rows
        z_label = tl.maximum(z_label, tl.load(field, mask=mask, other=0.0), _ALL)
        lse_rest = _logaddexp(lse_rest, tl.load(field + tokens, mask=mask, other=0.0))
        if FIELDS == 5:
            lse_z = _logaddexp(lse_z, tl.load(field + 2 * tokens, mask=mask, other=0.0))
            lse_t = _logaddexp(lse_t, tl.load(field + 3 * tokens, mask=mask, other=0.0))
    # Held to the range of fp32, which only logits at the very ends of that range can leave.
    margin = z_label - lse_rest
    margin = tl.where(margin > _LARGEST, _LARGEST, tl.where(margin < -_LARGEST, -_LARGEST, margin))
    margin = tl.where(z_label == _INF, float("nan"), margin)  # a logit that overflowed
    tl.store(margin_ptr + rows, margin.to(tl.float32), mask=mask)
    tl.store(lse_ptr + rows, lse_rest, mask=mask)
    kl = tl.zeros([BLOCK], tl.float64)
    if FIELDS == 5:
        tl.store(lse_ptr + tokens + rows, lse_z, mask=mask)
        tl.store(lse_ptr + 2 * tokens + rows, lse_t, mask=mask)
        for shard in range(tp):
            field = gathered_ptr + shard * FIELDS * tokens + rows
            shard_z = tl.load(field + 2 * tokens, mask=mask, other=0.0)
            shard_t = tl.load(field + 3 * tokens, mask=mask, other=0.0)
            shard_kl = tl.load(field + 4 * tokens, mask=mask, other=0.0)
            kl += _share(shard_z, shard_t, shard_kl, lse_z, lse_t)
        kl = tl.where(kl > _LARGEST, _LARGEST, tl.where(kl < 0.0, 0.0, kl))
    tl.store(kl_ptr + rows, kl.to(tl.float32), mask=mask)
