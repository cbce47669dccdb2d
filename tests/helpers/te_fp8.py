"""The fp8 of Transformer Engine's C++ extension by torch's: one scale for a tensor, delayed or current."""

from __future__ import annotations

import enum
from typing import Any

import torch
from torch import Tensor

from tests.helpers import simulated_cuda

_E4M3 = "kFloat8E4M3"
# Places of a module's quantizers, of up to three products.
_FORWARD = [f"GEMM{i}_{part}" for i in (1, 2, 3) for part in ("INPUT", "WEIGHT", "OUTPUT")]
_BACKWARD = [f"GRAD_{part}{i}" for i in (1, 2, 3) for part in ("OUTPUT", "INPUT")]
FP8FwdTensors = enum.IntEnum("FP8FwdTensors", _FORWARD, start=0)  # type: ignore[misc]
FP8BwdTensors = enum.IntEnum("FP8BwdTensors", _BACKWARD, start=0)  # type: ignore[misc]


def _type(quantizer: Any) -> torch.dtype:
    return torch.float8_e4m3fn if quantizer.dtype.name == _E4M3 else torch.float8_e5m2


def _cast(t: Tensor, quantizer: Any) -> tuple[Tensor, Tensor]:
    """Bytes, and the inverse of the scale `[1]`."""
    exact, kind = t.detach().float(), _type(quantizer)
    most = torch.finfo(kind).max
    largest = exact.abs().amax()
    if hasattr(quantizer, "scale"):  # learnt from the passes before
        scale = quantizer.scale.view(1)
        quantizer.amax.copy_(torch.maximum(quantizer.amax, largest))
    else:
        if quantizer.with_amax_reduction:
            torch.distributed.all_reduce(
                largest, torch.distributed.ReduceOp.MAX, quantizer.amax_reduction_group
            )
        scale = torch.where(largest > 0, most / largest, 1.0).view(1)
    data = (exact * scale).clamp(-most, most).to(kind).view(torch.uint8)
    return data.contiguous(), 1 / scale


def quantize(t: Tensor, quantizer: Any, out: Any = None, noop: Tensor | None = None) -> Any:
    """A tensor in fp8, or `out` with it."""
    if noop is not None and noop.item():
        return out
    data, inverse = _cast(t, quantizer)
    if out is None:
        return _tensor(quantizer, data, inverse, t.dtype)
    out._data.copy_(data)
    out._scale_inv.copy_(inverse)
    if out._transpose is not None:
        out._transpose.copy_(_transposed(data))
        out._transpose_invalid = False
    return out


def _transposed(data: Tensor) -> Tensor:
    return data.reshape(-1, data.shape[-1]).t().contiguous()


def _tensor(quantizer: Any, data: Tensor, inverse: Tensor, dtype: torch.dtype) -> Any:
    from transformer_engine.pytorch.tensor.float8_tensor import Float8Tensor
    from transformer_engine.pytorch.tensor.storage.float8_tensor_storage import (
        Float8TensorStorage,
    )

    parts = {
        "data": data,
        "fp8_scale_inv": inverse,
        "fp8_dtype": quantizer.dtype,
        "data_transpose": _transposed(data) if quantizer.columnwise_usage else None,
        "quantizer": quantizer,
    }
    if quantizer.internal:
        return Float8TensorStorage(**parts, fake_dtype=dtype)
    place = simulated_cuda.as_lazy(data.device)  # to C++, which asks a driver for others
    return Float8Tensor(**parts, shape=data.shape, dtype=dtype, device=place)


def create_empty_quantized_tensor(
    quantizer: Any, shape: list[int], dtype: torch.dtype, device: torch.device, pinned: bool
) -> Any:
    """A tensor of zeros in fp8."""
    data = torch.zeros(shape, dtype=torch.uint8, device=device)
    return _tensor(quantizer, data, torch.ones(1, device=device), dtype)


def dequantize(t: Any, dtype: Any = None) -> Tensor:
    """What a tensor in fp8 stands for, in fp32."""
    kind = torch.float8_e4m3fn if t._fp8_dtype.name == _E4M3 else torch.float8_e5m2
    if t._data is not None:
        return t._data.view(kind).float() * t._scale_inv
    return (t._transpose.view(kind).float() * t._scale_inv).t()


def fp8_transpose(data: Tensor, dtype: Any, out: Tensor | None = None) -> Tensor:
    """Of bytes."""
    return _transposed(data) if out is None else out.copy_(_transposed(data))


def bgrad_quantize(gradient: Tensor, quantizer: Any) -> tuple[Tensor, Any]:
    """Gradient of a bias, and that of the output in fp8."""
    of_bias = gradient.reshape(-1, gradient.shape[-1]).sum(dim=0)
    return of_bias, quantize(gradient, quantizer)


FUNCTIONS = (
    *(quantize, create_empty_quantized_tensor, dequantize, fp8_transpose),
    bgrad_quantize,
)
