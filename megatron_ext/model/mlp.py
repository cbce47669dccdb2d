"""Feed-forward layer whose SwiGLU moves little memory without a compiler too.

Megatron fuses SwiGLU through `torch.compile`; that is one kernel each way on a GPU and is used
there. Where nothing compiles (CPU), its hand-written backward runs as a dozen separate passes and a
concatenation; the function here writes both halves of the gradient in place instead.
"""

from functools import partial
from typing import Any

import torch
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from torch import Tensor
from torch.nn import functional


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        gate, linear = x.chunk(2, dim=-1)
        return functional.silu(gate).mul_(linear)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        gate, linear = x.chunk(2, dim=-1)
        out = torch.empty_like(x)
        d_gate, d_linear = out.chunk(2, dim=-1)
        torch.mul(grads[0], functional.silu(gate), out=d_linear)
        torch.ops.aten.silu_backward.grad_input(grads[0] * linear, gate, grad_input=d_gate)
        return out


def swiglu(x: Tensor) -> Tensor:
    """`silu(gate) * linear` of `x = [gate, linear]` `[..., 2 * ffn]`; keeps only `x`."""
    return _SwiGLU.apply(x)


def is_plain_swiglu(config: TransformerConfig) -> bool:
    """Whether feed-forward layers compute `silu(gate) * linear` and nothing else between their products."""
    return bool(
        config.gated_linear_unit
        and config.activation_func == functional.silu
        and config.activation_func_clamp_value is None
        and config.glu_linear_offset == 0.0
        and not config.activation_func_fp8_input_store
    )


class TorchMLP(MLP):
    """Megatron's MLP; eager SwiGLU off the GPU, everything else the parent's.

    Same parameters and checkpoint as the parent.
    """

    @classmethod
    def builder(cls, submodules: MLPSubmodules) -> partial:
        """What `TransformerLayerSubmodules.mlp` expects."""
        return partial(cls.as_mlp_submodule, submodules)

    def forward(
        self, hidden_states: Tensor, per_token_scale: Tensor | None = None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """Transform `hidden_states` `[s, b, hidden]`; the bias is returned, not added."""
        eager = not hidden_states.is_cuda and per_token_scale is None
        if not (eager and is_plain_swiglu(self.config)):
            return super().forward(hidden_states, per_token_scale, **kwargs)
        x, bias = self.linear_fc1(hidden_states)
        if bias is not None:
            x = x + bias
        return self.linear_fc2(swiglu(x))
