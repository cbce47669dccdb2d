"""Triton kernel of the unlearning head's gradient: one read of the logits, one write in their place.

Legend and precision as in `kernels`.
"""

# Triton reads the signatures itself; annotations other than constexpr mean something else to it.
# mypy: allow-untyped-defs, allow-incomplete-defs

import triton
import triton.language as tl

from benchmarks.candidate.kernels import (
    _APART,
    _EMPTY,
    _LOG2E,
    _NEAR,
    _exp,
    _expm1_over_x,
)


@triton.jit
def _split(lse):
    """An fp64 number as the sum of two fp32."""
    coarse = lse.to(tl.float32)
    return coarse, (lse - coarse.to(tl.float64)).to(tl.float32)


@triton.jit
def _softmax(z, coarse, fine):
    """e^(z - lse)."""
    return tl.exp2((z - coarse) * _LOG2E - fine * _LOG2E)


@triton.jit
def gradient_kernel(
    z_ptr,
    t_ptr,  # unused without KL
    out_ptr,  # may be z_ptr: a program reads its columns before it writes them
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
    TILES: tl.constexpr,
    WITH_MARGIN: tl.constexpr,
    WITH_KL: tl.constexpr,
):
    """Gradient of TILES blocks of columns of one row: what is the same for a row costs once."""
    row = tl.program_id(0).to(tl.int64)
    begin = tl.program_id(1) * (BLOCK * TILES)
    z_row = z_ptr + row * z_stride
    t_row = t_ptr + row * t_stride
    out_row = out_ptr + row * out_stride
    label = (tl.load(label_ptr + row) - first).to(tl.int32)
    present = (label >= 0) & (label < valid)
    lse_rest = tl.load(lse_rest_ptr + row)
    rest_coarse, rest_fine = _split(lse_rest)
    if WITH_MARGIN:
        grad_margin = tl.load(grad_margin_ptr + row)
    if WITH_KL:
        grad_kl = tl.load(grad_kl_ptr + row)
        lse_z = tl.load(lse_z_ptr + row)
        lse_t = tl.load(lse_t_ptr + row)
        z_coarse, z_fine = _split(lse_z)
        t_coarse, t_fine = _split(lse_t)
        delta, delta_fine = _split(lse_t - lse_z)
        inner = lse_rest - lse_z
        rest_share = _exp(inner.to(tl.float32))
        # From the margin, not the logit, which another thread may have overwritten.
        label_q = _exp((tl.load(margin_ptr + row) + inner).to(tl.float32))
    for start in range(begin, tl.minimum(begin + BLOCK * TILES, total), BLOCK):
        columns = start + tl.arange(0, BLOCK)
        here = present & (label >= start) & (label < start + BLOCK)
        z = tl.zeros([BLOCK], z_ptr.dtype.element_ty)
        t = tl.zeros([BLOCK], t_ptr.dtype.element_ty)
        if start + BLOCK <= valid:  # a mask whose end is not aligned would split the loads
            z = tl.load(z_row + columns)
            if WITH_KL:
                t = tl.load(t_row + columns)
        else:
            z = tl.load(z_row + columns, mask=columns < valid, other=0.0)
            if WITH_KL:
                t = tl.load(t_row + columns, mask=columns < valid, other=0.0)
        z = z.to(tl.float32)
        t = t.to(tl.float32)
        if start + BLOCK > valid:  # in fp32: fp16 has no such number
            z = tl.where(columns < valid, z, _EMPTY)
            t = tl.where(columns < valid, t, _EMPTY)
        rest = _softmax(z, rest_coarse, rest_fine)
        if WITH_KL:
            # One exponential fewer a column than from lse_z.
            q = rest * rest_share
            if here:
                q = tl.where(columns == label, label_q, q)
        if here:
            # Chosen, not added: the exponential of the label is exp(margin), which may be inf.
            rest = tl.where(columns == label, -1.0, rest)
        gradient = tl.zeros([BLOCK], tl.float32)
        if WITH_MARGIN:
            gradient = -grad_margin * rest
        if WITH_KL:
            p = _softmax(t, t_coarse, t_fine)
            if tl.abs(delta) > _APART:
                x = (t - t_coarse) - (z - z_coarse) - (t_fine - z_fine)
            else:
                x = ((t - z) - delta) - delta_fine
            # q - p, but where the plain difference has no correct digits left.
            near = -(q * x) * _expm1_over_x(x)
            gradient += grad_kl * tl.where(tl.abs(x) < _NEAR, near, q - p)
        tl.store(out_row + columns, gradient.to(out_ptr.dtype.element_ty), mask=columns < total)
