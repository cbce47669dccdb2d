"""Triton kernels of the unlearning head: one read of the logits forward, one read and write back.

Legend: N tokens, V columns of this shard; z the logits, t the reference's, p and q the
probabilities that t and z give, x = ln p - ln q.

The statistics kernel reads a row once. Within a block of columns it forms the maxima, the sums of
exponentials and the KL divergence of the block's own two distributions, then merges the block into
what it has by the chain rule of KL, as `vocab_parallel` merges the shards of tensor parallelism:
no term is a difference of large numbers, and no second sweep is needed to know the normaliser
first. The label's column is a block of one, merged last, because the margin excludes it.

Arithmetic over columns is fp32, whatever the logits are: fp64 exponentials would take longer than
the memory traffic. What is kept of a row is fp64, and a log-sum-exp is taken away from a logit in
two fp32 parts, so that an offset of the logits costs no digits.
"""

# Triton reads the signatures itself; annotations other than constexpr mean something else to it.
# ruff: noqa: ANN001, ANN201
# mypy: allow-untyped-defs, allow-incomplete-defs

import triton
import triton.language as tl

# Finite stand-in for -inf: differences of two of them are 0 and never NaN.
_EMPTY = tl.constexpr(-1.0e38)
# Below this |x| the series is used; above it the direct form has lost at most one digit.
_SERIES = tl.constexpr(0.5)


@triton.jit
def _kl_term(p, q, x):
    """Elementwise p (e^-x - 1 + x), never negative; truncation costs 4e-8 of it at most."""
    series = 1.0 / 5040.0 - x * (1.0 / 40320.0)
    series = 1.0 / 720.0 - x * series
    series = 1.0 / 120.0 - x * series
    series = 1.0 / 24.0 - x * series
    series = 1.0 / 6.0 - x * series
    series = 0.5 - x * series
    return tl.where(tl.abs(x) < _SERIES, p * (x * x) * series, q - p + p * x)


@triton.jit
def _expm1_series(x):
    """Elementwise e^x - 1 for |x| below _SERIES, accurate relative to itself."""
    series = 1.0 / 5040.0 + x * (1.0 / 40320.0)
    series = 1.0 / 720.0 + x * series
    series = 1.0 / 120.0 + x * series
    series = 1.0 / 24.0 + x * series
    series = 1.0 / 6.0 + x * series
    series = 0.5 + x * series
    series = 1.0 + x * series
    return x * series


@triton.jit
def _merge(z_max, z_sum, t_max, t_sum, kl, z_max_b, z_sum_b, t_max_b, t_sum_b, kl_b):
    """Join two disjoint sets of columns (scalars). An empty set has maximum _EMPTY and sum 0."""
    z_new = tl.maximum(z_max, z_max_b)
    t_new = tl.maximum(t_max, t_max_b)
    q_a = z_sum * tl.exp(z_max - z_new)
    q_b = z_sum_b * tl.exp(z_max_b - z_new)
    p_a = t_sum * tl.exp(t_max - t_new)
    p_b = t_sum_b * tl.exp(t_max_b - t_new)
    z_total = q_a + q_b
    t_total = p_a + p_b
    z_norm = 1.0 / tl.where(z_total > 0.0, z_total, 1.0)
    t_norm = 1.0 / tl.where(t_total > 0.0, t_total, 1.0)
    # ln(P/Q) of each part; from the logarithms, since P and Q themselves may underflow.
    shift = tl.log(t_total) - tl.log(z_total)
    x_a = ((t_max - t_new) - (z_max - z_new)) + (tl.log(t_sum) - tl.log(z_sum)) - shift
    x_b = ((t_max_b - t_new) - (z_max_b - z_new)) + (tl.log(t_sum_b) - tl.log(z_sum_b)) - shift
    x_a = tl.where(t_sum > 0.0, x_a, 0.0)
    x_b = tl.where(t_sum_b > 0.0, x_b, 0.0)
    p_a = p_a * t_norm
    p_b = p_b * t_norm
    joined = p_a * kl + p_b * kl_b
    joined += _kl_term(p_a, q_a * z_norm, x_a) + _kl_term(p_b, q_b * z_norm, x_b)
    return z_new, z_total, t_new, t_total, joined


@triton.jit
def _maxima(a0, b0, a1, b1):
    return tl.maximum(a0, a1), tl.maximum(b0, b1)


@triton.jit
def _sums(a0, b0, a1, b1):
    return a0 + a1, b0 + b1


@triton.jit
def _store_lse(out, largest, total):
    """Maximum and sum to a log-sum-exp in fp64; -inf for an empty set."""
    lse = largest.to(tl.float64) + tl.log(total).to(tl.float64)
    tl.store(out, tl.where(total > 0.0, lse, float("-inf")))


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
    t_max = _EMPTY + 0.0
    t_sum = 0.0
    kl = 0.0
    offsets = tl.arange(0, BLOCK)
    for start in range(0, valid, BLOCK):
        columns = start + offsets
        inside = columns < valid
        rest = inside & (columns != label)
        z = tl.load(z_row + columns, mask=inside, other=float("-inf")).to(tl.float32)
        t = tl.load(t_row + columns, mask=inside, other=float("-inf")).to(tl.float32)
        z = tl.where(rest, z, float("-inf"))
        t = tl.where(rest, t, float("-inf"))
        z_max_b, t_max_b = tl.reduce((z, t), 0, _maxima)
        z_max_b = tl.maximum(z_max_b, _EMPTY)
        t_max_b = tl.maximum(t_max_b, _EMPTY)
        z -= z_max_b
        t -= t_max_b
        q = tl.exp(z)
        p = tl.exp(t)
        z_sum_b, t_sum_b = tl.reduce((q, p), 0, _sums)
        q *= 1.0 / tl.where(z_sum_b > 0.0, z_sum_b, 1.0)
        p *= 1.0 / tl.where(t_sum_b > 0.0, t_sum_b, 1.0)
        x = (t - z) - (tl.log(t_sum_b) - tl.log(z_sum_b))
        kl_b = tl.sum(tl.where(rest, _kl_term(p, q, x), 0.0), 0)
        z_max, z_sum, t_max, t_sum, kl = _merge(
            z_max, z_sum, t_max, t_sum, kl, z_max_b, z_sum_b, t_max_b, t_sum_b, kl_b
        )
    z_label = tl.load(z_row + label, mask=present, other=float("-inf")).to(tl.float32)
    t_label = tl.load(t_row + label, mask=present, other=float("-inf")).to(tl.float32)
    tl.store(out_ptr + row, z_label.to(tl.float64))
    _store_lse(out_ptr + out_stride + row, z_max, z_sum)
    one = tl.where(present, 1.0, 0.0)
    z_label = tl.maximum(z_label, _EMPTY)
    t_label = tl.maximum(t_label, _EMPTY)
    z_max, z_sum, t_max, t_sum, kl = _merge(
        z_max, z_sum, t_max, t_sum, kl, z_label, one, t_label, one, 0.0
    )
    _store_lse(out_ptr + 2 * out_stride + row, z_max, z_sum)
    _store_lse(out_ptr + 3 * out_stride + row, t_max, t_sum)
    tl.store(out_ptr + 4 * out_stride + row, kl.to(tl.float64))


@triton.jit
def gradient_kernel(
    z_ptr,
    t_ptr,  # unused without KL
    out_ptr,  # may be z_ptr: a program reads its block before it writes it
    label_ptr,
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
        log_q = _subtract_lse(z, tl.load(lse_z_ptr + row))
        log_p = _subtract_lse(t, tl.load(lse_t_ptr + row))
        q = tl.exp(log_q)
        x = log_p - log_q
        # q - p = -q (e^x - 1): near x = 0 the plain difference has no correct digits left.
        difference = tl.where(tl.abs(x) < _SERIES, -q * _expm1_series(x), q - tl.exp(log_p))
        gradient += tl.load(grad_kl_ptr + row) * difference
    gradient = tl.where(inside, gradient, 0.0)
    out = out_ptr + row * out_stride + columns
    tl.store(out, gradient.to(out_ptr.dtype.element_ty), mask=columns < total)
