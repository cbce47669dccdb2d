"""Triton kernels of the unlearning head: one read of the logits forward, one read and write back.

Legend: N tokens, V columns of this shard; z the logits, t the reference's, q and p the
probabilities that z and t give.

Both statistics kernels read a row once. Every thread keeps sums of its own columns, relative to
maxima that all threads of the row share; nothing else is exchanged, and the sums are scaled anew
only when a maximum rises by more than _SLACK, which after the first columns is rare. The label is
left out of the sums, because the margin leaves it out; `joins` puts it back, in fp64.

Arithmetic over columns is fp32, whatever the logits are: fp64 exponentials would take longer than
the memory traffic. So that a student near its reference keeps its digits, everything is taken from
t - z, which is exact where the two are near, and ln(sum e^t / sum e^z) from e^(t-z) - 1, never
from the two sums. Where one column holds nearly all mass, it holds both maxima, and contributes
exactly 0 to the sum of e^x - 1. A log-sum-exp is fp64, and taken away in two fp32 parts, so that
an offset of the logits costs no digits.
"""

# Triton reads the signatures itself; annotations other than constexpr mean something else to it.
# mypy: allow-untyped-defs, allow-incomplete-defs

import triton
import triton.language as tl

# Finite stand-in for -inf: the difference of two of them is 0 and not NaN. Not in fp16, which ends at 65504.
_EMPTY = tl.constexpr(-3.38e38)
# Below every maximum that matters, and so far above _EMPTY that e^(_EMPTY - _LOWEST) is 0.
_LOWEST = tl.constexpr(-3.0e38)
# Below this |x| a series is used; above it the direct form has lost two bits at most.
_NEAR = tl.constexpr(0.25)
# Offsets between z and t beyond this are taken away from each before they are subtracted.
_APART = tl.constexpr(16.0)
# How far, in nats, a column may lie above the maximum that the sums are relative to.
_SLACK = tl.constexpr(2.0)
_LOG2E = tl.constexpr(1.4426950408889634)
# Neighbouring columns of one thread: 16 bytes of bf16.
WIDTH = tl.constexpr(8)


@triton.jit
def _exp(x):
    """e^x; denormal results are 0. On a GPU one product and one instruction."""
    return tl.exp2(x * _LOG2E)


@triton.jit
def _expm1_over_x(x):
    """(e^x - 1) / x for |x| below _NEAR, to 9e-8 of itself: Taylor, its x^5 economised."""
    series = 1.0 / 24.0 + 1.25 * 0.0625 / 720.0 + x * (1.0 / 120.0)
    series = 1.0 / 6.0 + x * series
    series = 0.5 - 0.3125 * 0.00390625 / 720.0 + x * series
    return 1.0 + x * series


@triton.jit
def _thread_max(x):
    """Maximum of each thread's columns, [LANES]."""
    return tl.max(tl.max(x, 2), 0)


@triton.jit
def _thread_sum(x):
    """Sum of each thread's columns, [LANES]."""
    return tl.sum(tl.sum(x, 2), 0)


@triton.jit
def _tile(LANES: tl.constexpr, LOADS: tl.constexpr):
    """Columns of a tile, [LOADS, LANES, WIDTH]: a thread holds whole rows of the last dimension."""
    load = tl.arange(0, LOADS)[:, None, None] * (LANES * WIDTH)
    lane = tl.arange(0, LANES)[None, :, None] * WIDTH
    return load + lane + tl.arange(0, WIDTH)[None, None, :]


@triton.jit
def _load(row, columns, valid, MASKED: tl.constexpr):
    """Logits of a tile, in their type; beyond the vocabulary 0, which _empty_beyond replaces."""
    if MASKED:
        return tl.load(row + columns, mask=columns < valid, other=0.0)
    return tl.load(row + columns)


@triton.jit
def _empty_beyond(x, columns, valid, MASKED: tl.constexpr):
    """fp32 logits of a tile, _EMPTY beyond the vocabulary."""
    x = x.to(tl.float32)
    if MASKED:
        x = tl.where(columns < valid, x, _EMPTY)
    return x


@triton.jit
def _margin_tile(z_row, start, tile, size, valid, label, z_max, z_sum, MASKED: tl.constexpr):
    """Adds a tile to the sum of e^(z - z_max)."""
    columns = start + tile
    z = _empty_beyond(_load(z_row, columns, valid, MASKED), columns, valid, MASKED)
    if (label >= start) & (label < start + size):
        z = tl.where(columns == label, _EMPTY, z)
    highest = _thread_max(z)
    if tl.max((highest > z_max + _SLACK).to(tl.int32), 0) > 0:
        new = tl.maximum(z_max, tl.max(highest, 0))
        z_sum = z_sum * _exp(z_max - new)
        z_max = new
    return z_max, z_sum + _thread_sum(_exp(z - z_max))


@triton.jit
def margin_kernel(
    z_ptr,  # logits, N rows
    label_ptr,  # [N] global ids
    out_ptr,  # [2, N] fp64: label logit, lse of the rest
    z_stride,
    out_stride,
    first,  # global id of this shard's first column
    valid,  # columns that are vocabulary, not padding
    LANES: tl.constexpr,
    LOADS: tl.constexpr,
):
    """Statistics of one row without a reference."""
    row = tl.program_id(0).to(tl.int64)
    z_row = z_ptr + row * z_stride
    label = (tl.load(label_ptr + row) - first).to(tl.int32)
    tile = _tile(LANES, LOADS)
    size: tl.constexpr = LANES * LOADS * WIDTH
    z_max = _LOWEST + 0.0
    z_sum = tl.zeros([LANES], tl.float32)
    whole = valid // size * size
    for start in range(0, whole, size):
        z_max, z_sum = _margin_tile(z_row, start, tile, size, valid, label, z_max, z_sum, False)
    if whole < valid:
        z_max, z_sum = _margin_tile(z_row, whole, tile, size, valid, label, z_max, z_sum, True)
    total = tl.sum(z_sum, 0)
    present = (label >= 0) & (label < valid)
    z_label = tl.load(z_row + label, mask=present, other=float("-inf")).to(tl.float64)
    lse = z_max.to(tl.float64) + tl.log(total.to(tl.float64))
    tl.store(out_ptr + row, z_label)
    tl.store(out_ptr + out_stride + row, tl.where(total == 0.0, float("-inf"), lse))


@triton.jit
def _rescale(z_old, t_old, z_new, t_new, q_sum, p_sum, gain, moment):
    """The sums of `_divergence_sums`, relative to other maxima."""
    a = _exp(z_old - z_new)
    b = _exp(t_old - t_new)
    step = tl.minimum(tl.maximum((t_old - z_old) - (t_new - z_new), -1e30), 1e30)
    near = tl.abs(step) < _NEAR
    growth = tl.where(near, a * (step * _expm1_over_x(step)), b - a)
    gain = b * gain + growth * q_sum
    moment = b * (moment + step * p_sum)
    return a * q_sum, b * p_sum, gain, moment


@triton.jit
def _divergence_sums(z, t, z_max, t_max, APART: tl.constexpr):
    """Each thread's sums of q, p, p - q and p ln(p/q), relative to the maxima."""
    from_z = z - z_max
    from_t = t - t_max
    q = _exp(from_z)
    p = _exp(from_t)
    # ln(p/q); the first form is exact for a reference near the student, but not for far offsets.
    x = (from_t - from_z) if APART else ((t - z) - (t_max - z_max))
    gain = tl.where(tl.abs(x) < _NEAR, (q * x) * _expm1_over_x(x), p - q)
    return _thread_sum(q), _thread_sum(p), _thread_sum(gain), _thread_sum(p * x)


@triton.jit
def _divergence_tile(
    z_row,
    t_row,
    start,
    tile,
    size,
    valid,
    label,
    z_max,
    t_max,
    q_sum,
    p_sum,
    gain,
    moment,
    MASKED: tl.constexpr,
):
    """Adds a tile to the sums."""
    columns = start + tile
    z = _load(z_row, columns, valid, MASKED)  # both under way before either is looked at
    t = _load(t_row, columns, valid, MASKED)
    z = _empty_beyond(z, columns, valid, MASKED)
    t = _empty_beyond(t, columns, valid, MASKED)
    if (label >= start) & (label < start + size):
        z = tl.where(columns == label, _EMPTY, z)
        t = tl.where(columns == label, _EMPTY, t)
    z_high = _thread_max(z)
    t_high = _thread_max(t)
    raised = (z_high > z_max + _SLACK) | (t_high > t_max + _SLACK)
    if tl.max(raised.to(tl.int32), 0) > 0:
        z_new = tl.maximum(z_max, tl.max(z_high, 0))
        t_new = tl.maximum(t_max, tl.max(t_high, 0))
        q_sum, p_sum, gain, moment = _rescale(
            z_max, t_max, z_new, t_new, q_sum, p_sum, gain, moment
        )
        z_max = z_new
        t_max = t_new
    if tl.abs(t_max - z_max) > _APART:
        a, b, c, d = _divergence_sums(z, t, z_max, t_max, True)
    else:
        a, b, c, d = _divergence_sums(z, t, z_max, t_max, False)
    return z_max, t_max, q_sum + a, p_sum + b, gain + c, moment + d


@triton.jit
def divergence_kernel(
    z_ptr,
    t_ptr,  # reference logits, N rows
    label_ptr,
    out_ptr,  # [8, N] fp32, see the end and `joins.finish_kernel`
    z_stride,
    t_stride,
    out_stride,
    first,
    valid,
    LANES: tl.constexpr,
    LOADS: tl.constexpr,
):
    """What one row with a reference sums up to, in one read of both rows."""
    row = tl.program_id(0).to(tl.int64)
    z_row = z_ptr + row * z_stride
    t_row = t_ptr + row * t_stride
    label = (tl.load(label_ptr + row) - first).to(tl.int32)
    tile = _tile(LANES, LOADS)
    size: tl.constexpr = LANES * LOADS * WIDTH
    z_max = _LOWEST + 0.0
    t_max = _LOWEST + 0.0
    q_sum = tl.zeros([LANES], tl.float32)
    p_sum = tl.zeros([LANES], tl.float32)
    gain = tl.zeros([LANES], tl.float32)
    moment = tl.zeros([LANES], tl.float32)
    whole = valid // size * size
    for start in range(0, whole, size):
        z_max, t_max, q_sum, p_sum, gain, moment = _divergence_tile(
            z_row, t_row, start, tile, size, valid, label,
            z_max, t_max, q_sum, p_sum, gain, moment, False,
        )  # fmt: skip
    if whole < valid:
        z_max, t_max, q_sum, p_sum, gain, moment = _divergence_tile(
            z_row, t_row, whole, tile, size, valid, label,
            z_max, t_max, q_sum, p_sum, gain, moment, True,
        )  # fmt: skip
    present = (label >= 0) & (label < valid)
    out = out_ptr + row
    tl.store(out, tl.load(z_row + label, mask=present, other=float("-inf")).to(tl.float32))
    tl.store(
        out + out_stride, tl.load(t_row + label, mask=present, other=float("-inf")).to(tl.float32)
    )
    tl.store(out + 2 * out_stride, z_max)
    tl.store(out + 3 * out_stride, t_max)
    tl.store(out + 4 * out_stride, tl.sum(q_sum, 0))
    tl.store(out + 5 * out_stride, tl.sum(p_sum, 0))
    tl.store(out + 6 * out_stride, tl.sum(gain, 0))
    tl.store(out + 7 * out_stride, tl.sum(moment, 0))
