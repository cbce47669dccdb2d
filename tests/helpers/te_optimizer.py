"""The optimizer of Transformer Engine's C++ extension by torch's operations."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

ADAM_W = 1  # of its modes


def multi_tensor_scale(chunk: int, overflow: Tensor, lists: list, scale: Any) -> None:
    """Each tensor of the first list, scaled, into that of the second."""
    for source, target in zip(*lists, strict=True):
        target.copy_(source * scale)


def multi_tensor_l2norm(
    chunk: int, overflow: Tensor, lists: list, per_tensor: bool = False
) -> tuple[Tensor, Tensor]:
    """Norm `[1]` of all, and of each one."""
    norms = torch.stack([t.float().norm() for t in lists[0]])
    return norms.norm().view(1), norms


@dataclass(frozen=True)
class _AdamW:
    """A step, in the order of the extension's arguments."""

    lr: float
    beta1: float
    beta2: float
    eps: float
    step: int
    mode: int
    bias_correction: bool
    decay: float

    def __post_init__(self) -> None:
        assert self.mode == ADAM_W

    def update(self, gradient: Tensor, parameter: Tensor, first: Tensor, second: Tensor) -> None:
        """Parameter in fp32 and its two moments, in place."""
        gradient = gradient.float()
        first.copy_(first.float().lerp(gradient, 1 - self.beta1))
        second.copy_(self.beta2 * second.float() + (1 - self.beta2) * gradient.square())
        mean, square = first.float(), second.float()
        if self.bias_correction:
            mean, square = mean / (1 - self.beta1**self.step), square / (1 - self.beta2**self.step)
        parameter.sub_(self.lr * (mean / (square.sqrt() + self.eps) + self.decay * parameter))


def multi_tensor_adam(chunk: int, overflow: Tensor, lists: list, *step: Any) -> None:
    """Gradients, parameters, their two moments, and parameters in fp32 where it has any."""
    adam = _AdamW(*step)
    for gradient, parameter, first, second, *main in zip(*lists, strict=True):
        adam.update(gradient, main[0] if main else parameter, first, second)
        if main:
            parameter.copy_(main[0])


def multi_tensor_adam_param_remainder(
    chunk: int, overflow: Tensor, lists: list, *step: Any
) -> None:
    """Parameters in fp32 are bf16, rounded to the nearest, and the 16 bits that this leaves out."""
    adam = _AdamW(*step)
    for gradient, parameter, first, second, rest in zip(*lists, strict=True):
        high = parameter.view(torch.int16).int() - (rest < 0).int()
        exact = (high * 2**16 + (rest.int() & 0xFFFF)).view(torch.float32)
        adam.update(gradient, exact, first, second)
        bits = exact.view(torch.int32)
        rest.copy_(bits.to(torch.int16))
        parameter.view(torch.int16).copy_((bits >> 16) + (rest < 0).int())


FUNCTIONS = (
    *(multi_tensor_scale, multi_tensor_l2norm, multi_tensor_adam),
    multi_tensor_adam_param_remainder,
)
