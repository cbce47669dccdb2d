"""A rank's experts, computed together where that is faster than one after another.

Megatron's local experts are complete feed-forward layers that run in turn. With a hundred small ones most
of the time is spent between the products. Here only the products are one per expert, or one for all of
them (`--moe-grouped-gemm`); the activation is computed for all rows at once.

Legend: R rows, which are tokens as often as experts of this rank were chosen for them, sorted by expert; E
experts of this rank; H hidden size; m width of an expert on this rank.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from megatron.core.fusions.fused_bias_swiglu import weighted_bias_swiglu_impl
from megatron.core.models.backends import LocalSpecProvider
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.tensor_parallel.random import CheckpointWithoutOutput
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.moe.experts import SequentialMLP
from torch import Tensor
from torch.nn import functional

from megatron_ext.exceptions import ConfigError
from megatron_ext.losses.head_linear import add_product, fused_weight_gradient
from megatron_ext.model.hooks import run_forward_pre_hooks
from megatron_ext.model.mlp import is_plain_swiglu

Function = torch.autograd.Function
ALIGNMENT = 16  # bytes; of the rows that torch's grouped product takes


class _WeightedSwiGLU(Function):
    """Backward writes both halves in place, as that of `megatron_ext.model.mlp` does."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weights: Tensor) -> Tensor:
        ctx.save_for_backward(x, weights)
        gate, linear = x.chunk(2, dim=-1)
        return functional.silu(gate).mul_(linear).mul_(weights[:, None])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        x, weights = ctx.saved_tensors
        gate, linear = x.chunk(2, dim=-1)
        activated = functional.silu(gate)
        d_weights = (activated * linear).to(weights.dtype).mul_(grads[0]).sum(dim=-1)
        weighted = (grads[0] * weights[:, None]).to(x.dtype)
        out = torch.empty_like(x)
        d_gate, d_linear = out.chunk(2, dim=-1)
        torch.mul(weighted, activated, out=d_linear)
        torch.ops.aten.silu_backward.grad_input(weighted.mul_(linear), gate, grad_input=d_gate)
        return out, d_weights


def weighted_swiglu(x: Tensor, weights: Tensor) -> Tensor:
    """`weights * silu(gate) * linear` of `x = [gate, linear]`.

    Args:
        x: `[R, 2 m]`.
        weights: `[R]`, fp32 or of the type of `x`.

    Returns:
        `[R, m]`, of the type of `x`.
    """
    return _WeightedSwiGLU.apply(x, weights)


class _OneByOne(Function):
    """A product for each expert, written into one tensor."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: list[int], fuse: bool, *weights: Tensor) -> Tensor:
        ctx.rows, ctx.main_grads = rows, _main_grads(weights, fuse=fuse)
        ctx.save_for_backward(x, *weights)
        out = x.new_empty(x.shape[0], weights[0].shape[0])
        for part, block, weight in zip(x.split(rows), out.split(rows), weights, strict=True):
            torch.mm(part, weight.t(), out=block)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, *weights = ctx.saved_tensors
        grad = grads[0].contiguous()
        d_x: Tensor | None = None
        if ctx.needs_input_grad[0]:
            d_x = torch.empty_like(x)
            blocks = zip(grad.split(ctx.rows), d_x.split(ctx.rows), weights, strict=True)
            for part, block, weight in blocks:
                torch.mm(part, weight, out=block)
        needed = ctx.needs_input_grad[3:]
        d_weights = _gradients_one_by_one(grad, x, ctx.rows, weights, ctx.main_grads, needed)
        return d_x, None, None, *d_weights


def _main_grads(weights: Sequence[Tensor], *, fuse: bool) -> list[Tensor | None]:
    """Megatron's buffers for the gradients; they are no part of the graph."""
    return [getattr(weight, "main_grad", None) if fuse else None for weight in weights]


def _gradients_one_by_one(
    grad: Tensor,
    x: Tensor,
    rows: list[int],
    weights: Sequence[Tensor],
    main_grads: Sequence[Tensor | None],
    needed: Sequence[bool],
) -> list[Tensor | None]:
    """What autograd is told of each weight; its gradient is added to Megatron's buffer where there is one.

    Args:
        grad: `[R, outputs]`.
        x: `[R, inputs]`.
        rows: Of each expert.
        weights: `[outputs, inputs]` of each.
        main_grads: Of each, of the same shape.
        needed: Of each, whether it is trained.
    """
    found: list[Tensor | None] = []
    experts = zip(grad.split(rows), x.split(rows), weights, main_grads, needed, strict=True)
    for left, right, weight, main_grad, trained in experts:
        if not trained:
            found.append(None)
        elif main_grad is None:
            found.append(left.t() @ right)
        else:
            if right.shape[0] > 0:
                add_product(main_grad, left.t(), right, overwrite=False)
            found.append(fused_weight_gradient(weight))
    return found


class _AtOnce(Function):
    """One product for all experts, by torch's grouped kernel.

    It wants their weights in one tensor. They are parameters of their own, since so Megatron's optimizer
    and checkpoints have them, and are copied together each way: that is `E m H` elements read and written
    against products of `R m H`. A view cannot replace the copy: DDP's buffer has them in reverse, and
    torch has no negative strides.

    Where Megatron sums weights' gradients in its buffers, those are one product for each expert, which adds
    to the buffer in its precision; the grouped kernel writes only a new tensor.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, counts: Tensor, rows: list[int] | None, *weights: Tensor
    ) -> Tensor:
        ends = counts.cumsum(0, dtype=torch.int32)
        ctx.rows, ctx.main_grads = rows, _main_grads(weights, fuse=rows is not None)
        ctx.save_for_backward(x, counts, ends, *weights)
        return functional.grouped_mm(x, torch.stack(weights).transpose(1, 2), offs=ends)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, counts, ends, *weights = ctx.saved_tensors
        grad = grads[0].contiguous()
        d_x: Tensor | None = None
        if ctx.needs_input_grad[0]:
            d_x = functional.grouped_mm(grad, torch.stack(weights), offs=ends)
        d_weights: Sequence[Tensor | None] = [None] * len(weights)
        needed = ctx.needs_input_grad[3:]
        if any(found is not None for found in ctx.main_grads):
            d_weights = _gradients_one_by_one(grad, x, ctx.rows, weights, ctx.main_grads, needed)
        elif any(needed):
            product = functional.grouped_mm(grad.t(), x, offs=ends)
            # On a B200 an expert without rows would get what memory held (pytorch/pytorch#172439).
            d_weights = product.masked_fill_((counts == 0)[:, None, None], 0).unbind()
        return d_x, None, None, *d_weights


class TorchExperts(SequentialMLP):
    """Megatron's local experts, SwiGLU of all of them at once.

    Parameters and checkpoint are the parent's. Another activation is computed by the parent.
    """

    def forward(
        self,
        permuted_local_hidden_states: Tensor,
        tokens_per_expert: Tensor,
        permuted_probs: Tensor,
    ) -> tuple[Tensor, Tensor | None]:
        """Output of a rank's experts.

        Args:
            permuted_local_hidden_states: `[R, H]`, sorted by expert.
            tokens_per_expert: `[E]`, how many of the rows are each expert's; sums to R.
            permuted_probs: `[R]`, the router's weight of each row.

        Returns:
            `[R, H]`, of several tensor-parallel ranks a part of the sum; and None for a bias.
        """
        if not is_plain_swiglu(self.config):
            return super().forward(permuted_local_hidden_states, tokens_per_expert, permuted_probs)
        hidden, weights = permuted_local_hidden_states, permuted_probs
        if self.config.moe_apply_probs_on_input:
            hidden = (weights[:, None] * hidden).to(hidden.dtype)
            weights = torch.ones_like(weights)
        multiply = self._product(hidden, tokens_per_expert)
        halves = multiply(hidden, *self._weights("linear_fc1", hidden))
        again = None
        if _recomputes_activation(self.config):
            again = CheckpointWithoutOutput(fp8=None)
            activated = again.checkpoint(self._activation, halves, weights)
        else:
            activated = self._activation(halves, weights)
        out = multiply(activated, *self._weights("linear_fc2", activated))
        if again is not None:
            again.discard_output_and_register_recompute(out)
        return out, None

    def _product(self, hidden: Tensor, tokens_per_expert: Tensor) -> Any:
        """What multiplies rows by the weights of their experts."""
        fuse = self.config.gradient_accumulation_fusion
        if self.config.moe_grouped_gemm and hidden.shape[0] > 0:
            counts = _beside(hidden, tokens_per_expert)
            known = tokens_per_expert.tolist() if fuse else None
            return lambda x, *weights: _AtOnce.apply(x, counts, known, *weights)
        rows = tokens_per_expert.tolist()
        return lambda x, *weights: _OneByOne.apply(x, rows, fuse, *weights)

    def _weights(self, layer: str, inputs: Tensor) -> list[Tensor]:
        linears = [expert.get_submodule(layer) for expert in self.local_experts]
        for linear in linears:
            run_forward_pre_hooks(linear, inputs)
        return [linear.get_parameter("weight") for linear in linears]

    def _activation(self, halves: Tensor, weights: Tensor) -> Tensor:
        if halves.is_cuda and self.config.bias_activation_fusion:  # compiled
            return weighted_bias_swiglu_impl(halves, None, weights[:, None], False)
        return weighted_swiglu(halves, weights)


class TorchSpecProvider(LocalSpecProvider):
    """Megatron's local modules with the experts above."""

    def grouped_mlp_modules(self, moe_use_grouped_gemm: bool) -> Any:
        """Builds the experts of a rank; how they are multiplied their config says."""
        linears = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
        return partial(TorchExperts, submodules=linears)


def check_grouped(config: TransformerConfig) -> None:
    """Refuse what torch's grouped product, or the experts around it, do not take.

    Raises:
        ConfigError: `moe_grouped_gemm` with another activation than SwiGLU, with a dispatcher that may hand
            over more rows than experts have, or with rows whose size is no multiple of `ALIGNMENT`.
    """
    if config.num_moe_experts is None or not config.moe_grouped_gemm:
        return
    if not is_plain_swiglu(config):
        raise ConfigError(
            "--moe-grouped-gemm: the torch-native layers expect --swiglu, found another activation"
        )
    if config.moe_token_dispatcher_type == "flex":
        raise ConfigError(
            "--moe-token-dispatcher-type: the torch-native layers expect allgather or alltoall beside "
            "--moe-grouped-gemm, found flex"
        )
    multiple = ALIGNMENT // config.params_dtype.itemsize
    sizes = {
        "--hidden-size": config.hidden_size,
        "--moe-ffn-hidden-size": config.moe_ffn_hidden_size // config.expert_tensor_parallel_size,
    }
    for flag, size in sizes.items():
        if size % multiple:
            raise ConfigError(
                f"{flag}: expected a multiple of {multiple} on each rank beside --moe-grouped-gemm "
                f"({config.params_dtype}), found {size}"
            )


def _beside(hidden: Tensor, counts: Tensor) -> Tensor:
    """`counts` on the device of `hidden`.

    Megatron's dispatchers hand them over on the host. Copied from pageable memory, or without `non_blocking`,
    they would make the host wait for all that the GPU has yet to do, in every layer.
    """
    if counts.device == hidden.device:
        return counts
    return counts.pin_memory().to(hidden.device, non_blocking=True)


def _recomputes_activation(config: TransformerConfig) -> bool:
    selective = config.recompute_granularity == "selective"
    return selective and "moe_act" in (config.recompute_modules or ())
