"""Triton kernel of `megatron_ext.model.rope`: one read and one write of the rotated heads.

`TRITON_INTERPRET=1` runs it on the CPU, which is how it is tested without a GPU.
"""

# ruff: noqa: ANN001

import os

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # a CPU build of torch comes without Triton
    triton = None

_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def usable(t: Tensor) -> bool:
    """Whether the kernel can rotate `t`: on a GPU, or anywhere under Triton's interpreter."""
    return triton is not None and (t.is_cuda or _INTERPRETED)


if triton is not None:

    @triton.jit
    def _rotate_kernel(  # type: ignore[no-untyped-def]  # Triton's types are not Python's
        t_ptr,
        out_ptr,
        cos_ptr,
        sin_ptr,
        batch,
        heads,
        t_stride_s,
        t_stride_b,
        t_stride_g,
        t_stride_h,
        out_stride_s,
        out_stride_b,
        out_stride_g,
        out_stride_h,
        HALF: tl.constexpr,
        ROWS: tl.constexpr,
        COLUMNS: tl.constexpr,
        TOTAL_HEADS: tl.constexpr,
        BACK: tl.constexpr,
    ):
        token = tl.program_id(0)
        position = (token // batch).to(tl.int64)
        column = tl.arange(0, COLUMNS)
        inside = column < HALF
        cos = tl.load(cos_ptr + position * HALF + column, mask=inside, other=0.0)[None, :]
        sin = tl.load(sin_ptr + position * HALF + column, mask=inside, other=0.0)[None, :]
        if BACK:
            sin = -sin
        sample = (token % batch).to(tl.int64)
        t_start = t_ptr + position * t_stride_s + sample * t_stride_b + column[None, :]
        out_start = out_ptr + position * out_stride_s + sample * out_stride_b + column[None, :]
        for first_row in range(0, TOTAL_HEADS, ROWS):
            row = first_row + tl.arange(0, ROWS)
            mask = (row < TOTAL_HEADS)[:, None] & inside[None, :]
            group, head = row // heads, row % heads
            source = t_start + (group * t_stride_g + head * t_stride_h)[:, None]
            target = out_start + (group * out_stride_g + head * out_stride_h)[:, None]
            a = tl.load(source, mask=mask, other=0.0).to(tl.float32)
            b = tl.load(source + HALF, mask=mask, other=0.0).to(tl.float32)
            dtype = out_ptr.dtype.element_ty
            tl.store(target, (a * cos - b * sin).to(dtype), mask=mask)
            tl.store(target + HALF, (b * cos + a * sin).to(dtype), mask=mask)


def rotate_into(t: Tensor, out: Tensor, cos: Tensor, sin: Tensor, *, back: bool = False) -> None:
    """Rotate `t` `[s, b, g, n, d]` into `out`, which may be `t`; see `rope.rotate_into`."""
    assert t.dim() == 5, "expected [s, b, g, n, d]"
    assert t.shape == out.shape
    assert t.stride(-1) == out.stride(-1) == 1, "the last dimension must be contiguous"
    s, b, g, heads, _ = t.shape
    half = cos.shape[-1]
    columns = triton.next_power_of_2(half)
    # 4096 pairs a step keep loads wide; a row of heads fits in one step up to 64 heads of 128.
    rows = min(triton.next_power_of_2(g * heads), max(1, 4096 // columns))
    with torch.cuda.device_of(t):
        _rotate_kernel[(s * b,)](
            t,
            out,
            cos.contiguous(),
            sin.contiguous(),
            b,
            heads,
            *t.stride()[:4],
            *out.stride()[:4],
            HALF=half,
            ROWS=rows,
            COLUMNS=columns,
            TOTAL_HEADS=g * heads,
            BACK=back,
            enable_fp_fusion=True,
        )
