"""The autograd function of the unlearning head. See `head` for what it computes and why.

T tokens, H hidden size, V vocabulary columns of this shard; c tokens and v columns of a block.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_ext.losses.blocks import no_statistics
from megatron_ext.losses.head_plan import HeadPlan, slice_rows
from megatron_ext.losses.head_products import HeadProducts
from megatron_ext.losses.vocab_parallel import (
    RowStatistics,
    gather_statistics,
    join_statistics,
)


class UnlearningHeadFunction(torch.autograd.Function):
    """Matrix products, statistics and their derivative, written by hand."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        order: Tensor | None,
        reference_hidden: Tensor | None,
        reference_weight: Tensor | None,
        plan: HeadPlan,
    ) -> tuple[Tensor, Tensor]:
        """See `unlearning_head`. `order` is `[T]`, replay tokens first; None: as they are."""
        tokens, labels, reference_hidden = plan.sorted_tokens(
            hidden, labels, order, reference_hidden
        )
        student = plan.student(tokens, weight) if plan.blocks.whole else None
        stats, logits, reference = _statistics(
            plan, tokens, weight, labels, student, reference_hidden, reference_weight
        )
        rows = plan.kernels.combine_statistics(gather_statistics(stats, plan.group))
        kept = (student if plan.blocks.whole else logits, reference) if plan.keep else None
        ctx.save_for_backward(
            tokens,
            weight,
            reference_hidden,
            reference_weight,
            labels,
            order,
            rows.margin,
            rows.kl,
            rows.lse_rest,
            rows.lse_z,
            rows.lse_t,
        )
        ctx.plan, ctx.kept = plan, kept
        # Not a saved tensor: Megatron re-creates buffers, and the sum is meant to change.
        ctx.main_grad = getattr(weight, "main_grad", None) if plan.fuse_weight_gradient else None
        ctx.set_materialize_grads(False)
        if not plan.references:
            ctx.mark_non_differentiable(rows.kl)
        return unsorted(rows.margin, order), unsorted(rows.kl, order)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_margin: Tensor | None, grad_kl: Tensor | None) -> tuple[Any, ...]:
        """Gradients of `hidden` and `weight`."""
        tokens, weight, reference_hidden, reference_weight, labels, order, *saved = (
            ctx.saved_tensors
        )
        plan, rows = ctx.plan, RowStatistics(*saved)
        if not plan.references:
            grad_kl = None
        if order is not None:
            grad_margin = None if grad_margin is None else grad_margin[order]
            grad_kl = None if grad_kl is None else grad_kl[order]
        # The gradient overwrites them: a second backward through the same graph makes them again.
        kept, ctx.kept = ctx.kept, None
        first, reference = (None, None) if kept is None else kept
        del kept
        products = HeadProducts(
            tokens,
            weight,
            order,
            main_grad=ctx.main_grad,
            needs=ctx.needs_input_grad[:2],
            group=plan.group,
            scatter=plan.sequence_parallel,
        )
        gradients = student = None
        if plan.blocks.whole:
            student = plan.student(tokens, weight) if first is None else first
            first = None
            gradients = gradient_place(student, weight)
        for part, columns in plan.tiles(tokens.shape[0], weight.shape[0]):
            logits = student[part] if student is not None else first
            if logits is None:
                logits = plan.student(tokens[part], weight[columns])
            if reference is None:
                reference = plan.reference(part, columns, reference_hidden, reference_weight)
            out = gradient_place(logits, weight) if gradients is None else gradients[part]
            plan.gradient(
                logits,
                reference,
                labels[part],
                slice_rows(rows, part),
                None if grad_margin is None else grad_margin[part],
                None if grad_kl is None else grad_kl[part],
                columns,
                out,
            )
            first = logits = reference = None
            if gradients is None:
                products.add(out, part, columns)
            del out
        del student
        if gradients is not None:
            products.add(gradients, slice(0, tokens.shape[0]), slice(0, weight.shape[0]))
        return *products.results(), None, None, None, None, None


def _statistics(
    plan: HeadPlan,
    tokens: Tensor,
    weight: Tensor,
    labels: Tensor,
    student: Tensor | None,
    reference_hidden: Tensor | None,
    reference_weight: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Statistics of this shard, `[2, T]` or `[5, T]`, and the logits of the first block.

    The first block comes last: backward begins with it, and it is never a short one.
    """
    first, *others = plan.tiles(tokens.shape[0], weight.shape[0])
    fields = 5 if plan.references else 2
    stats = no_statistics(fields, tokens.shape[0] if others else 0, device=tokens.device)
    logits = reference = None
    for rows, columns in (*others, first):
        del logits, reference
        logits = (
            student[rows] if student is not None else plan.student(tokens[rows], weight[columns])
        )
        reference = plan.reference(rows, columns, reference_hidden, reference_weight)
        found = plan.statistics(logits, reference, labels[rows], columns)
        if columns != slice(0, weight.shape[0]):
            found = join_statistics(torch.stack([stats[:, rows], found]))
        if others:
            stats[:, rows] = found
        else:
            stats = found
    assert logits is not None
    return stats, logits, reference


def gradient_place(logits: Tensor, weight: Tensor) -> Tensor:
    """Where the gradient of logits goes: over them, if it has their type."""
    return logits if logits.dtype == weight.dtype else torch.empty_like(logits, dtype=weight.dtype)


def unsorted(values: Tensor, order: Tensor | None) -> Tensor:
    """Values `[T]` of the sorted tokens, back in the order of the batch."""
    if order is None:
        return values
    return torch.empty_like(values).index_copy_(0, order, values)
