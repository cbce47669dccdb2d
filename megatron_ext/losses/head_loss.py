"""The unlearning head of training: where the loss is known, no logit is made twice.

`unlearning_head` ends with margins and KLs, and learns their gradients when autograd comes back; logits
that did not fit in memory are then made again: four products for three without a reference, six for four
with one. Here the loss comes in as a function, of some tokens at a time: the gradients of a chunk's logits
are taken while these are there, and turned into those of hidden states and weight at once. The chunk may be
small, and every product is made once.

Legend: T tokens, H hidden size, V vocabulary columns of this tensor-parallel shard, c tokens of a chunk.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_ext.head_chunks import training_chunk
from megatron_ext.losses.head_function import UnlearningHeadFunction, gradient_place, unsorted
from megatron_ext.losses.head_inputs import Backend, check_cuda_labels, prepare
from megatron_ext.losses.head_linear import fused_weight_gradient
from megatron_ext.losses.head_memory import Blocks
from megatron_ext.losses.head_plan import HeadPlan
from megatron_ext.losses.head_products import HeadProducts
from megatron_ext.losses.vocab_parallel import gather_statistics

# Some tokens: their places in the batch, by which a `[T]` tensor can be indexed.
Places = slice | Tensor
# What some tokens bring to the loss: margins `[c]`, KLs `[c]` (both fp32) and places to a scalar.
TokenLoss = Callable[[Tensor, Tensor, Places], Tensor]


class HeadLoss(NamedTuple):
    """The loss of a batch, and what it was made of.

    Attributes:
        loss: Scalar, differentiable in the hidden states and the weight.
        margin: `[T]` fp32, the log-odds of the label; without a gradient.
        kl: `[T]` fp32, `KL(p_reference || p)` in nats, as in `HeadOutput`; without a gradient.
    """

    loss: Tensor
    margin: Tensor
    kl: Tensor


def unlearning_head_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    roles: Tensor,
    token_loss: TokenLoss,
    *,
    reference_hidden: Tensor | None = None,
    reference_weight: Tensor | None = None,
    tp_group: dist.ProcessGroup | None = None,
    sequence_parallel: bool = False,
    vocab_size: int | None = None,
    chunk_size: int | None = None,
    fp32_logits: bool = False,
    fuse_weight_gradient: bool = False,
    backend: Backend | None = None,
) -> HeadLoss:
    """A loss that is a sum over tokens, with the gradients taken in the forward pass.

    Logits that fit (see `training_chunk`) are kept for the backward pass, as `unlearning_head` does.
    Otherwise forward makes the gradients, chunk by chunk, and keeps them: `[T, H]`, and `[V, H]` in
    fp32; backward scales them. In fp16, where gradients need the scale of the loss before they are
    rounded, logits that do not fit are made twice.

    Communication: as `unlearning_head`, but an all-gather of statistics for each chunk.

    Args:
        hidden: As in `unlearning_head`, like all arguments that are not described here.
        weight: See there.
        labels: See there.
        roles: See there.
        token_loss: The loss: for all tokens the sum of what it is for parts of them, whose margins
            and KLs it is given in any order. It depends on the parameters through these alone, is the
            same on all ranks of `tp_group`, and is called for each chunk and once for all tokens.
        reference_hidden: See there.
        reference_weight: See there.
        tp_group: See there.
        sequence_parallel: See there.
        vocab_size: See there.
        chunk_size: Tokens whose logits exist at a time, the same on all ranks of `tp_group`. None
            chooses from the device's memory: the devices of a group must be of one kind.
        fp32_logits: See there.
        fuse_weight_gradient: See there.
        backend: See there.

    Returns:
        The loss, margins and KLs, the same on all ranks.

    Raises:
        TypeError: As `unlearning_head`.
        ValueError: As `unlearning_head`.
        RuntimeError: By the backward pass, if it has been through the same graph before.
    """
    tokens = labels.shape[0]

    def blocks(references: int, element: int) -> Blocks:
        size = chunk_size
        if size is None:
            device, memory = weight.device, None
            if device.type == "cuda":
                memory = torch.cuda.get_device_properties(device).total_memory
            size = training_chunk(
                tokens,
                weight.shape[0],
                weight.shape[1],
                references,
                element_size=element,
                gradient_size=max(weight.element_size(), 4),
                gpu_memory=memory,
            )
        return Blocks(max(size, 1), weight.shape[0], size >= tokens)

    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size must be positive, got {chunk_size}")
    inputs = prepare(
        hidden,
        weight,
        labels,
        roles,
        reference_hidden=reference_hidden,
        reference_weight=reference_weight,
        tp_group=tp_group,
        sequence_parallel=sequence_parallel,
        vocab_size=vocab_size,
        fp32_logits=fp32_logits,
        fuse_weight_gradient=fuse_weight_gradient,
        backend=backend,
        blocks=blocks,
    )
    plan = inputs.plan
    with torch.cuda.device_of(hidden):  # where Triton launches
        if not plan.keep or plan.blocks.whole or hidden.dtype == torch.float16:
            margin, kl = UnlearningHeadFunction.apply(*inputs)
            result = HeadLoss(token_loss(margin, kl, slice(None)), margin.detach(), kl.detach())
        else:
            result = HeadLoss(*UnlearningHeadLossFunction.apply(token_loss, *inputs))
    check_cuda_labels(inputs, vocab_size)
    return result


class UnlearningHeadLossFunction(torch.autograd.Function):
    """Loss, margins and KLs; the gradients are ready when forward ends, but for the scale of the loss."""

    @staticmethod
    def forward(
        ctx: Any,
        token_loss: TokenLoss,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        order: Tensor | None,
        reference_hidden: Tensor | None,
        reference_weight: Tensor | None,
        plan: HeadPlan,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See `unlearning_head_loss`; `order` is `[T]`, tokens with a reference first, or None."""
        tokens, labels, reference_hidden = plan.sorted_tokens(
            hidden, labels, order, reference_hidden
        )
        products = HeadProducts(
            tokens,
            weight,
            order,
            main_grad=None,
            needs=ctx.needs_input_grad[1:3],
            group=plan.group,
            scatter=plan.sequence_parallel,
        )
        margins, kls = [], []
        # No chunk is larger than the first, and no later one has more tokens with a reference.
        logits = reference = None
        for rows, columns in plan.tiles(tokens.shape[0], weight.shape[0]):
            logits = plan.student(tokens[rows], weight, logits)
            reference = plan.reference(rows, columns, reference_hidden, reference_weight, reference)
            stats = plan.statistics(logits, reference, labels[rows], columns)
            found = plan.kernels.combine_statistics(gather_statistics(stats, plan.group))
            margins.append(found.margin)
            kls.append(found.kl)
            gradients = _derivatives(
                token_loss, found.margin, found.kl, rows if order is None else order[rows]
            )
            out = gradient_place(logits, weight)
            plan.gradient(logits, reference, labels[rows], found, *gradients, columns, out)
            if tokens.is_cuda:  # whose allocator gives the memory back as it was
                logits = reference = None
            products.add(out, rows, columns)
            del out
        del logits, reference
        # Not saved tensors: a backward pass uses them up.
        ctx.products, ctx.weight = products, weight
        ctx.main_grad = getattr(weight, "main_grad", None) if plan.fuse_weight_gradient else None
        margin, kl = (unsorted(torch.cat(values), order) for values in (margins, kls))
        ctx.mark_non_differentiable(margin, kl)
        return token_loss(margin, kl, slice(None)), margin, kl

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scale: Tensor, *_: Tensor | None) -> tuple[Any, ...]:
        """Gradients of `hidden` and `weight`."""
        products, ctx.products = ctx.products, None
        if products is None:
            raise RuntimeError(
                "a second backward pass through unlearning_head_loss, whose gradients the first has used up"
            )
        hidden, weight = products.sums()
        del products
        if hidden is not None:
            hidden.mul_(scale)
        if weight is not None and ctx.main_grad is not None:
            ctx.main_grad.addcmul_(weight, scale)
            del weight  # before autograd's own is made
            weight = fused_weight_gradient(ctx.weight)
        elif weight is not None:
            weight = weight.mul_(scale).to(ctx.weight.dtype)
        return None, hidden, weight, None, None, None, None, None


def _derivatives(
    token_loss: TokenLoss, margin: Tensor, kl: Tensor, places: Places
) -> tuple[Tensor, Tensor]:
    """Gradients of the loss in the margins `[c]` and the KLs `[c]` of some tokens."""
    with torch.enable_grad():
        terms = margin.detach().requires_grad_(), kl.detach().requires_grad_()
        loss = token_loss(*terms, places)
        grad_margin, grad_kl = torch.autograd.grad(
            loss, terms, allow_unused=True, materialize_grads=True
        )
    return grad_margin, grad_kl
