"""The matrix products and the tensor-parallel traffic of the unlearning head.

T tokens, H hidden size, V vocabulary columns of this shard, c tokens of a chunk.
"""

import torch
import torch.distributed as dist
from torch import Tensor

# Bytes of the weight that a product reads at a time on a CPU.
CPU_WEIGHT = 2 * 2**20


def gather_tokens(hidden: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """All-gather the token shards `[T/tp, H]` of sequence parallelism into `[T, H]`."""
    size = 1 if group is None else group.size()
    if size == 1:
        return hidden
    gathered = hidden.new_empty(size * hidden.shape[0], hidden.shape[1])
    dist.all_gather_into_tensor(gathered, hidden.contiguous(), group=group)
    return gathered


def start_reduction(
    grad_hidden: Tensor, group: dist.ProcessGroup | None, *, scatter: bool
) -> tuple[Tensor, dist.Work | None]:
    """Sum `d hidden` over the vocabulary shards without waiting for the result.

    Args:
        grad_hidden: `[T, H]`, this shard's part.
        group: Tensor-parallel group; None is one shard.
        scatter: Sequence parallelism: each rank gets its own `[T/tp, H]`.

    Returns:
        The tensor that holds the sum once the second value has been waited for.
    """
    if group is None or group.size() == 1:
        return grad_hidden, None
    if not scatter:
        return grad_hidden, dist.all_reduce(grad_hidden, group=group, async_op=True)
    mine = grad_hidden.new_empty(grad_hidden.shape[0] // group.size(), grad_hidden.shape[1])
    return mine, dist.reduce_scatter_tensor(mine, grad_hidden, group=group, async_op=True)


def project(hidden: Tensor, weight: Tensor, *, fp32: bool, space: Tensor | None = None) -> Tensor:
    """Logits of some tokens.

    Args:
        hidden: `[c, H]`.
        weight: `[V, H]`.
        fp32: Leave the logits unrounded.
        space: `[c or more, V]` of the logits' type, which is not needed any more. On a CPU they are written
            there, because new memory costs its first touch (`benchmarks/NOTES.md`).

    Returns:
        `[c, V]` in the weights' type, or unrounded in fp32.
    """
    unrounded = fp32 and weight.dtype.itemsize < 4
    if not hidden.is_cuda:
        return _project_on_cpu(hidden.float() if unrounded else hidden, weight, space)
    if unrounded:  # the product is summed in fp32 anyway; only its rounding is left out
        return torch.mm(hidden, weight.t(), out_dtype=torch.float32)
    return hidden @ weight.t()


def _project_on_cpu(hidden: Tensor, weight: Tensor, space: Tensor | None) -> Tensor:
    """As many columns at a time as leave their part of the weight in the cache."""
    columns = max(1, CPU_WEIGHT // max(weight.shape[1] * weight.element_size(), 1))
    if space is None:
        space = hidden.new_empty(hidden.shape[0], weight.shape[0])
    logits = space[: hidden.shape[0]]
    for start in range(0, weight.shape[0], columns):
        part = weight[start : start + columns].to(hidden.dtype)
        torch.mm(hidden, part.t(), out=logits[:, start : start + columns])
    return logits


def add_product(total: Tensor, left: Tensor, right: Tensor, *, overwrite: bool) -> None:
    """`total += left right`, summed in `total`'s type.

    Args:
        total: `[m, n]`, fp32 where several blocks or microbatches are summed.
        left: `[m, k]`.
        right: `[k, n]`, of the type of `left`.
        overwrite: `total` holds nothing yet.
    """
    beta = 0 if overwrite else 1
    if total.dtype == left.dtype:
        total.addmm_(left, right, beta=beta)
    elif total.is_cuda and total.dtype == torch.float32:
        torch.addmm(total, left, right, out_dtype=torch.float32, beta=beta, out=total)
    else:
        total.addmm_(left.to(total.dtype), right.to(total.dtype), beta=beta)


def fused_weight_gradient(weight: Tensor) -> Tensor | None:
    """What autograd is told once `weight.main_grad` has received the gradient.

    Megatron's protocol for gradient-accumulation fusion: where the parameter carries
    `grad_added_to_main_grad`, set it and hand autograd a tensor of the right shape so that its
    hooks run on the main thread (zeros if `zero_out_wgrad`, otherwise never read); else nothing.
    """
    if not hasattr(weight, "grad_added_to_main_grad"):
        return None
    weight.grad_added_to_main_grad = True
    if getattr(weight, "zero_out_wgrad", False):
        return torch.zeros_like(weight)
    return torch.empty_like(weight)
