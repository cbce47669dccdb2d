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
        cos_ptr,
        sin_ptr,
        batch,
        heads,
        stride_s,
        stride_b,
        stride_g,
        stride_h,
        HALF: tl.constexpr,
        ROWS: tl.constexpr,
        COLUMNS: tl.constexpr,
        TOTAL_HEADS: tl.constexpr,
    ):
        token = tl.program_id(0)
        position = (token // batch).to(tl.int64)
        column = tl.arange(0, COLUMNS)
        inside = column < HALF
        cos = tl.load(cos_ptr + position * HALF + column, mask=inside, other=0.0)[None, :]
        sin = tl.load(sin_ptr + position * HALF + column, mask=inside, other=0.0)[None, :]
        start = t_ptr + position * stride_s + (token % batch).to(tl.int64) * stride_b
        for first_row in range(0, TOTAL_HEADS, ROWS):
            row = first_row + tl.arange(0, ROWS)
            offset = (row // heads) * stride_g + (row % heads) * stride_h
            pointer = start + offset[:, None] + column[None, :]
            mask = (row < TOTAL_HEADS)[:, None] & inside[None, :]
            a = tl.load(pointer, mask=mask, other=0.0).to(tl.float32)
            b = tl.load(pointer + HALF, mask=mask, other=0.0).to(tl.float32)
            dtype = t_ptr.dtype.element_ty
            tl.store(pointer, (a * cos - b * sin).to(dtype), mask=mask)
            tl.store(pointer + HALF, (b * cos + a * sin).to(dtype), mask=mask)


def rotate_(t: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Rotate `t` `[s, b, g, heads, d]` in place; see `megatron_ext.model.rope.rotate_`."""
    assert t.dim() == 5, "expected [s, b, g, heads, d]"
    assert t.stride(-1) == 1, "the last dimension must be contiguous"
    s, b, g, heads, _ = t.shape
    half = cos.shape[-1]
    columns = triton.next_power_of_2(half)
    # 4096 pairs a step keep loads wide; a row of heads fits in one step up to 64 heads of 128.
    rows = min(triton.next_power_of_2(g * heads), max(1, 4096 // columns))
    with torch.cuda.device_of(t):
        _rotate_kernel[(s * b,)](
            t,
            cos.contiguous(),
            sin.contiguous(),
            b,
            heads,
            *t.stride()[:4],
            HALF=half,
            ROWS=rows,
            COLUMNS=columns,
            TOTAL_HEADS=g * heads,
        )
