"""Triton kernels of the unlearning head: one read of the logits forward, one read and write back.

Legend: N tokens, V columns of this shard; z the logits, t the reference's, q and p the
probabilities that z and t give.

The statistics kernels read a row once. With a reference, a set of columns is known by the
log-sum-exp of z, the difference `delta = lse_t - lse_z`, and the KL of its two distributions. Sets
are joined by the chain rule of KL, as `vocab_parallel` joins tensor-parallel shards: block
by block along the row, and last the label, a set of one, because the margin leaves it out.

Arithmetic over columns is fp32, whatever the logits are: fp64 exponentials would take longer than
the memory traffic. So that a student near its reference keeps its digits, everything is taken from
t - z, which is exact where the two are near, and `delta` from e^(t-z) - 1, never from the two
log-sum-exps. What is kept of a row is fp64; a log-sum-exp is taken away in two fp32 parts, so that
an offset of the logits costs no digits.

A NaN or +inf among the logits makes all that depends on it NaN, here and in `vocab_parallel`. A maximum
on a GPU drops a NaN unless it is told not to: that of logits may, for their sum keeps it; others must not.
"""

# Triton reads the signatures itself; annotations other than constexpr mean something else to it.
# ruff: noqa: ANN001, ANN201
# mypy: allow-untyped-defs, allow-incomplete-defs

import triton
import triton.language as tl

# Finite stand-in for -inf, in bf16 as well: the difference of two of them is 0 and not NaN.
_EMPTY = tl.constexpr(-3.38e38)
# Below this |x| series are used; above it the direct forms have lost two bits at most.
_NEAR = tl.constexpr(0.25)
# Offsets between z and t beyond this are taken away from each before they are subtracted.
_APART = tl.constexpr(64.0)
_ALL = tl.constexpr(tl.PropagateNan.ALL)


@triton.jit
def _expm1_series(x):
    """Elementwise e^x - 1 for |x| below _NEAR, to 5e-8 of itself."""
    series = 1.0 / 120.0 + x * (1.0 / 720.0)
    series = 1.0 / 24.0 + x * series
    series = 1.0 / 6.0 + x * series
    series = 0.5 + x * series
    return x + (x * x) * series


@triton.jit
def _log1p_series(x):
    """Scalar ln(1 + x) for |x| below 0.3, to 3e-9 of itself."""
    r = x / (2.0 + x)
    square = r * r
    series = 1.0 / 7.0 + square * (1.0 / 9.0)
    series = 1.0 / 5.0 + square * series
    series = 1.0 / 3.0 + square * series
    return 2.0 * (r + r * square * series)


@triton.jit
def _kl_term(p, q, x):
    """Scalar p (e^-x - 1 + x) for x = ln p/q: one set's share of a KL, never negative."""
    series = 1.0 / 120.0 - x * (1.0 / 720.0)
    series = 1.0 / 24.0 - x * series
    series = 1.0 / 6.0 - x * series
    series = 0.5 - x * series
    return tl.where(tl.abs(x) < _NEAR, p * (x * x) * series, q - p + p * x)


@triton.jit
def _merge(z_max, z_sum, anchor, delta, kl, z_max_b, z_sum_b, anchor_b, delta_b, kl_b):
    """Joins two disjoint sets of columns (scalars). An empty set has maximum _EMPTY and sum 0.

    `lse_t - lse_z` of a set is `anchor + delta`: the anchor, in fp64, is the difference t - z at
    what weighs most, so that `delta` is small, and exact, where one column holds nearly all mass.
    """
    z_new = tl.maximum(z_max, z_max_b)
    a = z_sum * tl.exp(z_max - z_new)
    b = z_sum_b * tl.exp(z_max_b - z_new)
    total = a + b
    norm = 1.0 / tl.where(total > 0.0, total, 1.0)
    # Logarithms of the masses, since the masses themselves may underflow.
    log_total = tl.log(total)
    log_a = (z_max - z_new) + tl.log(z_sum) - log_total
    log_b = (z_max_b - z_new) + tl.log(z_sum_b) - log_total
    apart = ((anchor_b - anchor) + (delta_b - delta).to(tl.float64)).to(tl.float32)
    # No inf, so no inf - inf.
    apart = tl.minimum(tl.maximum(apart, _EMPTY, _ALL), -_EMPTY, _ALL)
    # Seen from the set with the larger mass under z.
    swap = b > a
    apart = tl.where(swap, -apart, apart)
    q_more = tl.where(swap, b, a) * norm
    q_less = tl.where(swap, a, b) * norm
    log_more = tl.where(swap, log_b, log_a)
    log_less = tl.where(swap, log_a, log_b) + apart
    near = tl.abs(apart) < _NEAR
    gain = tl.where(near, q_less * _expm1_series(apart), tl.exp(log_less) - q_less)
    largest = tl.maximum(log_more, log_less)
    far = largest + tl.log(tl.exp(log_more - largest) + tl.exp(log_less - largest))
    step = tl.where(tl.abs(gain) < 0.3, _log1p_series(gain), far)
    p_more = tl.exp(log_more - step)
    p_less = tl.exp(log_less - step)
    joined = p_more * tl.where(swap, kl_b, kl) + p_less * tl.where(swap, kl, kl_b)
    joined += _kl_term(p_more, q_more, -step) + _kl_term(p_less, q_less, apart - step)
    alone = (z_sum == 0.0) | (z_sum_b == 0.0)
    joined = tl.where(alone, tl.where(swap, kl_b, kl), joined)
    anchor = tl.where(swap, anchor_b, anchor)
    delta = tl.where(swap, delta_b, delta) + tl.where(alone, 0.0, step)
    return z_new, total, anchor, delta, joined


@triton.jit
def _maxima(a0, b0, a1, b1):
    return tl.maximum(a0, a1), tl.maximum(b0, b1)


@triton.jit
def _sums(a0, b0, c0, d0, a1, b1, c1, d1):
    return a0 + a1, b0 + b1, c0 + c1, d0 + d1


@triton.jit
def _store_lse(out, largest, total):
    """Maximum and sum to a log-sum-exp in fp64; -inf for an empty set."""
    lse = largest.to(tl.float64) + tl.log(total.to(tl.float64))
    tl.store(out, tl.where(total == 0.0, float("-inf"), lse))


@triton.jit
def _subtract_lse(z, lse):
    """Takes an fp64 lse away from z, in two fp32 parts."""
    coarse = lse.to(tl.float32)
    return (z - coarse) - (lse - coarse.to(tl.float64)).to(tl.float32)


@triton.jit
def margin_kernel(
    z_ptr,  # logits, N rows
    label_ptr,  # [N] global ids
    out_ptr,  # [2, N] fp64: label logit, lse of the rest
    z_stride,
    out_stride,
    first,  # global id of this shard's first column
    valid,  # columns that are vocabulary, not padding
    BLOCK: tl.constexpr,
):
    """Statistics of one row without a reference: a running maximum and sum."""
    row = tl.program_id(0).to(tl.int64)
    z_row = z_ptr + row * z_stride
    label = (tl.load(label_ptr + row) - first).to(tl.int32)
    present = (label >= 0) & (label < valid)
    z_max = _EMPTY + 0.0
    z_sum = 0.0
    offsets = tl.arange(0, BLOCK)
    for start in range(0, valid, BLOCK):
        columns = start + offsets
        rest = (columns < valid) & (columns != label)
        z = tl.load(z_row + columns, mask=columns < valid, other=float("-inf")).to(tl.float32)
        z = tl.where(rest, z, float("-inf"))
        z_new = tl.maximum(z_max, tl.max(z, 0))
        z_sum = z_sum * tl.exp(z_max - z_new) + tl.sum(tl.exp(z - z_new), 0)
        z_max = z_new
    z_label = tl.load(z_row + label, mask=present, other=float("-inf")).to(tl.float64)
    tl.store(out_ptr + row, z_label)
    _store_lse(out_ptr + out_stride + row, z_max, z_sum)


@triton.jit
def divergence_kernel(
    z_ptr,
    t_ptr,  # reference logits, N rows
    label_ptr,
    out_ptr,  # [5, N] fp64: label logit, lse of the rest, lse of z, lse of t, KL
    z_stride,
    t_stride,
    out_stride,
    first,
    valid,
    BLOCK: tl.constexpr,
):
    """Statistics of one row with a reference, in one read of both rows."""
    row = tl.program_id(0).to(tl.int64)
    z_row = z_ptr + row * z_stride
    t_row = t_ptr + row * t_stride
    label = (tl.load(label_ptr + row) - first).to(tl.int32)
    present = (label >= 0) & (label < valid)
    z_max = _EMPTY + 0.0
    z_sum = 0.0
    anchor = tl.zeros([], tl.float64)
    delta = 0.0
    kl = 0.0
    offsets = tl.arange(0, BLOCK)
    for start in range(0, valid, BLOCK):
        columns = start + offsets
        rest = (columns < valid) & (columns != label)
        z = tl.load(z_row + columns, mask=columns < valid, other=0.0).to(tl.float32)
        t = tl.load(t_row + columns, mask=columns < valid, other=0.0).to(tl.float32)
        z_max_b, t_max_b = tl.reduce(
            (tl.where(rest, z, _EMPTY), tl.where(rest, t, _EMPTY)), 0, _maxima
        )
        shift = t_max_b - z_max_b
        q = tl.where(rest, tl.exp(z - z_max_b), 0.0)
        p = tl.where(rest, tl.exp(t - t_max_b), 0.0)
        # ln(p/q), but for a constant.
        apart = tl.abs(shift) > _APART
        x = tl.where(apart, (t - t_max_b) - (z - z_max_b), (t - z) - shift)
        gain = tl.where(tl.abs(x) < _NEAR, q * _expm1_series(x), p - q)
        moment = tl.where(p > 0.0, p * x, 0.0)  # x may be inf where p is 0
        z_sum_b, t_sum_b, gain_b, mean_b = tl.reduce((q, p, gain, moment), 0, _sums)
        safe = tl.where(z_sum_b > 0.0, z_sum_b, 1.0)
        growth = gain_b / safe
        small = tl.abs(growth) < 0.3
        change = tl.where(small, _log1p_series(growth), tl.log(t_sum_b) - tl.log(z_sum_b))
        kl_b = mean_b / tl.where(t_sum_b > 0.0, t_sum_b, 1.0) - change
        anchor_b = t_max_b.to(tl.float64) - z_max_b.to(tl.float64)
        kl_b = tl.maximum(kl_b, 0.0, _ALL)
        z_max, z_sum, anchor, delta, kl = _merge(
            z_max, z_sum, anchor, delta, kl, z_max_b, z_sum_b, anchor_b, change, kl_b
        )
    z_label = tl.load(z_row + label, mask=present, other=_EMPTY).to(tl.float32)
    t_label = tl.load(t_row + label, mask=present, other=_EMPTY).to(tl.float32)
    t_label = tl.where(t_label == float("inf"), float("nan"), t_label)
    tl.store(out_ptr + row, tl.where(present, z_label.to(tl.float64), float("-inf")))
    _store_lse(out_ptr + out_stride + row, z_max, z_sum)
    one = tl.where(present, 1.0, 0.0)
    anchor_b = t_label.to(tl.float64) - z_label.to(tl.float64)
    z_max, z_sum, anchor, delta, kl = _merge(
        z_max, z_sum, anchor, delta, kl, z_label, one, anchor_b, 0.0, 0.0
    )
    lse_z = z_max.to(tl.float64) + tl.log(z_sum.to(tl.float64))
    # Within fp32, which only logits at the very ends of its range can leave.
    lse_t = lse_z + (anchor + delta.to(tl.float64))
    lse_t = tl.minimum(tl.maximum(lse_t, -3.4e38, _ALL), 3.4e38, _ALL)
    lse_z = tl.where(z_sum == 0.0, float("-inf"), lse_z)
    lse_t = tl.where(z_sum == 0.0, float("-inf"), lse_t)
    tl.store(out_ptr + 2 * out_stride + row, lse_z)
    tl.store(out_ptr + 3 * out_stride + row, lse_t)
    tl.store(out_ptr + 4 * out_stride + row, kl.to(tl.float64))


@triton.jit
def gradient_kernel(
    z_ptr,
    t_ptr,  # unused without KL
    out_ptr,  # may be z_ptr: a program reads its block before it writes it
    label_ptr,
    margin_ptr,  # [N] fp32
    lse_rest_ptr,  # [N] fp64, and so the two below
    lse_z_ptr,
    lse_t_ptr,
    grad_margin_ptr,  # [N] fp32
    grad_kl_ptr,  # [N] fp32
    z_stride,
    t_stride,
    out_stride,
    first,
    valid,
    total,  # columns with the padding
    BLOCK: tl.constexpr,
    WITH_MARGIN: tl.constexpr,
    WITH_KL: tl.constexpr,
):
    """Gradient of a block of columns of one row."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < valid
    z = tl.load(z_ptr + row * z_stride + columns, mask=inside, other=float("-inf")).to(tl.float32)
    gradient = tl.zeros([BLOCK], tl.float32)
    if WITH_MARGIN:
        label = (tl.load(label_ptr + row) - first).to(tl.int32)
        grad_margin = tl.load(grad_margin_ptr + row)
        rest = tl.exp(_subtract_lse(z, tl.load(lse_rest_ptr + row)))
        # Chosen, not added: at the label the exponential is exp(margin), which may be inf.
        gradient = grad_margin * tl.where(columns == label, 1.0, -rest)
    if WITH_KL:
        t = tl.load(t_ptr + row * t_stride + columns, mask=inside, other=0.0).to(tl.float32)
        lse_z = tl.load(lse_z_ptr + row)
        lse_t = tl.load(lse_t_ptr + row)
        log_p = _subtract_lse(t, lse_t)
        if WITH_MARGIN:
            # One exponential fewer a column: its units are what this kernel fills next to memory.
            inner = tl.load(lse_rest_ptr + row) - lse_z
            label_q = tl.exp((tl.load(margin_ptr + row) + inner).to(tl.float32))
            q = tl.where(columns == label, label_q, rest * tl.exp(inner.to(tl.float32)))
        else:
            q = tl.exp(_subtract_lse(z, lse_z))
        delta = lse_t - lse_z
        apart = tl.abs(delta) > _APART
        x = tl.where(apart, log_p - _subtract_lse(z, lse_z), _subtract_lse(t - z, delta))
        # q - p = -q (e^x - 1): near x = 0 the plain difference has no correct digits left.
        near = tl.abs(x) < _NEAR
        p = tl.exp(tl.minimum(log_p, 0.0, _ALL))
        difference = tl.where(near, -q * _expm1_series(x), q - p)
        gradient += tl.load(grad_kl_ptr + row) * difference
    gradient = tl.where(inside, gradient, 0.0)
    out = out_ptr + row * out_stride + columns
    tl.store(out, gradient.to(out_ptr.dtype.element_ty), mask=columns < total)
