"""Transformer Engine's C++ extension by torch's operations: what a GPT calls of it.

Only its names, the order of its arguments and what it computes are known here, from the Python code of
Transformer Engine that calls it. Any other function ends a run with its name.
"""

from __future__ import annotations

import enum
import itertools
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from tests.helpers import te_fp8, te_optimizer

# Types of numbers; it asks for all of these.
_TYPES = "kByte kInt32 kFloat32 kFloat16 kBFloat16 kFloat8E4M3 kFloat8E5M2 kFloat4E2M1"
DType = enum.IntEnum("DType", _TYPES.split(), start=0)  # type: ignore[misc]


class FusedAttention(enum.IntEnum):
    """Kinds of cuDNN's attention; it asks for all of these."""

    NVTE_No_Backend = -1
    NVTE_F16_arbitrary_seqlen = 0
    NVTE_FP8 = 1


_TORCH = {
    DType.kByte: torch.uint8,
    DType.kInt32: torch.int32,
    DType.kFloat32: torch.float32,
    DType.kFloat16: torch.float16,
    DType.kBFloat16: torch.bfloat16,
}


class _Numbered(type):
    """An enumeration of whatever it is asked for."""

    def __getattr__(cls, name: str) -> int:
        if name.startswith("__"):
            raise AttributeError(name)
        value = next(cls.numbers)
        setattr(cls, name, value)
        return value


def _enumeration(name: str) -> type:
    return _Numbered(name, (), {"numbers": itertools.count()})


def _exact(t: Any) -> Tensor:
    """In place of fp8 what it stands for; a GPU multiplies fp8 and adds in fp32, too."""
    return t if type(t) in (Tensor, torch.nn.Parameter) else te_fp8.dequantize(t)


def _flat(t: Tensor) -> Tensor:
    return t.reshape(-1, t.shape[-1])


def generic_gemm(
    a: Tensor,
    transpose_a: bool,
    b: Tensor,
    transpose_b: bool,
    out: Tensor | None,
    quantizer: Any,
    dtype: Any,
    bias: Tensor | None,
    bias_dtype: Any,
    gelu: bool,
    gelu_input: Any,
    grad: bool,
    workspace: Tensor,
    workspace_size: int,
    accumulate: bool,
    split_accumulator: bool,
    **options: Any,
) -> tuple[Tensor, Tensor | None, None, None]:
    """`b @ a` in rows, as BLAS has it in columns: `(a or its transpose) (b or its transpose)`."""
    assert quantizer is None
    assert not gelu
    a, b = _exact(a), _exact(b)
    left = _flat(b).t() if transpose_b else _flat(b)
    right = _flat(a).t() if transpose_a else _flat(a)
    result = left @ right
    of_bias = None
    if bias is not None:
        if grad:
            of_bias = _flat(b).sum(dim=0)
        else:
            result += bias
    if out is not None:
        result = result.to(out.dtype).view_as(out)
        out.copy_(out + result if accumulate else result)
        return out, of_bias, None, None
    if dtype is not None:
        result = result.to(_TORCH[DType(int(dtype))])
    if not transpose_b:
        result = result.view(*b.shape[:-1], -1)
    return result, of_bias, None, None


def te_general_grouped_gemm(
    a: list[Tensor],
    transpose_a: bool,
    b: list[Tensor],
    transpose_b: bool,
    out: list[Tensor],
    dtype: Any,
    rows: list[int],
    bias: list[Tensor],
    bias_dtype: Any,
    single_output: bool,
    gelu_input: list[Tensor],
    grad: bool,
    workspaces: Any,
    workspace_size: int,
    accumulate: bool,
    *options: Any,
) -> list[Tensor]:
    """A product for each expert, into the rows of one output, or into an output of its own."""
    assert not any(t.numel() for t in (*bias, *gelu_input))
    targets = out[0].split(list(rows)) if single_output else out
    for left, right, target in zip(a, b, targets, strict=True):
        left, right = (left.t() if transpose_a else left), (right.t() if transpose_b else right)
        result = (right @ left).to(target.dtype)  # of no rows: zeros, or nothing
        target.copy_(target + result if accumulate else result)
    return bias


def rmsnorm_fwd(
    inputs: Tensor,
    weight: Tensor,
    eps: float,
    out: Tensor | None,
    quantizer: Any,
    dtype: Any,
    sm_margin: int,
    zero_centered: bool,
) -> tuple[Tensor, None, Tensor]:
    """Result `[n, h]`, nothing in the place of means, and `1 / rms` `[n]`."""
    exact = inputs.float()
    scale = (exact.square().mean(dim=-1) + eps).rsqrt()
    result = (exact * scale[:, None] * (weight.float() + int(zero_centered))).to(inputs.dtype)
    if quantizer is not None:
        return te_fp8.quantize(result, quantizer, out), None, scale
    return (result if out is None else out.copy_(result)), None, scale


def rmsnorm_bwd(
    gradient: Tensor,
    inputs: Tensor,
    scale: Tensor,
    weight: Tensor,
    sm_margin: int,
    zero_centered: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of inputs and weight."""
    gradient = gradient.float().view_as(inputs)
    normal = inputs.float() * scale[:, None]
    inner = gradient * (weight.float() + int(zero_centered))
    of_inputs = (inner - normal * (inner * normal).mean(dim=-1, keepdim=True)) * scale[:, None]
    return of_inputs.to(inputs.dtype), (gradient * normal).sum(dim=0).to(weight.dtype)


def _rotated(t: Tensor, angles: Tensor, sign: int) -> Tensor:
    """`[s, b, h, d]` by angles `[s, 1, 1, r]`; the d - r last stay."""
    angles = angles[: len(t)]
    turned, rest = t.tensor_split((angles.shape[-1],), dim=-1)
    turned = turned.float()
    first, second = turned.chunk(2, dim=-1)
    turned = turned * angles.cos() + torch.cat((-second, first), dim=-1) * angles.sin() * sign
    return torch.cat((turned.to(t.dtype), rest), dim=-1)


def fused_rope_forward(
    t: Tensor,
    angles: Tensor,
    starts: Tensor | None,
    layout: Any,
    interleaved: bool,
    ends: Tensor | None,
    ranks: int,
    rank: int,
    *,
    sign: int = 1,
) -> Tensor:
    """Rotation of samples of one length."""
    assert starts is None
    assert not interleaved
    assert ends is None
    assert ranks == 1
    return _rotated(t, angles, sign)


def fused_rope_backward(*args: Any) -> Tensor:
    """Rotation back."""
    return fused_rope_forward(*args, sign=-1)


def convert_thd_to_bshd(t: Tensor, ends: Tensor, samples: int, longest: int) -> Tensor:
    """`[samples, longest, h, d]`, zeros behind each one's tokens."""
    result = t.new_zeros(samples, longest, *t.shape[1:])
    for row, part in zip(result, t.split(ends.diff().tolist()), strict=True):
        row[: len(part)] = part
    return result


def convert_bshd_to_thd(t: Tensor, ends: Tensor, tokens: int) -> Tensor:
    """`[tokens, h, d]`."""
    parts = [row[:length] for row, length in zip(t, ends.diff().tolist(), strict=True)]
    result = torch.cat(parts)
    assert len(result) == tokens
    return result


def module() -> ModuleType:
    """The extension, to import as `transformer_engine_torch`."""
    found = ModuleType("transformer_engine_torch")
    computed = (
        *(generic_gemm, rmsnorm_fwd, rmsnorm_bwd, fused_rope_forward, fused_rope_backward),
        *(te_general_grouped_gemm, convert_thd_to_bshd, convert_bshd_to_thd),
        *(*te_optimizer.FUNCTIONS, *te_fp8.FUNCTIONS),
    )
    for function in computed:
        setattr(found, function.__name__, function)
    found.multi_tensor_scale_tensor = te_optimizer.multi_tensor_scale  # type: ignore[attr-defined]
    for enumeration in (DType, te_fp8.FP8FwdTensors, te_fp8.FP8BwdTensors):
        setattr(found, enumeration.__name__, enumeration)
    found.NVTE_Fused_Attn_Backend = FusedAttention  # type: ignore[attr-defined]
    none = FusedAttention.NVTE_No_Backend, "a CPU has no kernel of cuDNN's"
    found.get_fused_attn_backend = lambda *_, **__: none  # type: ignore[attr-defined]
    found.get_cublasLt_version = lambda: 130000  # type: ignore[attr-defined]
    found.get_cudnn_version = lambda: 91501  # type: ignore[attr-defined]
    found.get_num_cublas_streams = lambda: 4  # type: ignore[attr-defined]
    found.ubuf_built_with_mpi = lambda: False  # type: ignore[attr-defined]

    def other(name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if name[0].isupper():
            value: Any = _enumeration(name)
        else:

            def value(*args: Any, **options: Any) -> None:
                raise NotImplementedError(f"transformer_engine_torch.{name}, {len(args)} arguments")

        setattr(found, name, value)
        return value

    found.__getattr__ = other  # type: ignore[method-assign, assignment]
    other("layernorm_fwd"), other("layernorm_bwd")  # taken beside those of RMSNorm
    return found
