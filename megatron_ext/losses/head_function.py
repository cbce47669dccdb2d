"""The autograd function of the unlearning head. See `head` for what it computes and why.

T tokens, c tokens of a chunk, H hidden size, V vocabulary columns of this shard.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_ext.losses.head_linear import (
    add_weight_gradient,
    fused_weight_gradient,
    gather_tokens,
    project,
    start_reduction,
)
from megatron_ext.losses.vocab_parallel import RowStatistics, gather_statistics


@dataclass(frozen=True)
class HeadPlan:
    """All that one call of the head has decided; see `unlearning_head`.

    `whole`: the student's logits are made, and if `keep` kept, for all tokens at once; a chunk then
    is one of the reference's. `keep`: there will be a backward pass.
    """

    kernels: ModuleType
    group: dist.ProcessGroup | None
    sequence_parallel: bool
    vocab_start: int
    valid_columns: int
    references: int
    chunk_size: int
    fp32_logits: bool
    fuse_weight_gradient: bool
    whole: bool
    keep: bool

    def chunks(self, tokens: int) -> Iterator[slice]:
        """Slices of the sorted tokens."""
        return (
            slice(i, min(i + self.chunk_size, tokens))
            for i in range(0, max(tokens, 1), self.chunk_size)
        )

    def student(self, hidden: Tensor, weight: Tensor) -> Tensor:
        """Logits `[c, V]`."""
        return project(hidden, weight, fp32=self.fp32_logits)

    def reference(
        self, chunk: slice, hidden: Tensor | None, weight: Tensor | None
    ) -> Tensor | None:
        """The reference's logits of the first tokens of a chunk; None if none of them has any."""
        if hidden is None or weight is None or chunk.start >= self.references:
            return None
        rows = hidden[chunk.start : min(chunk.stop, self.references)]
        return project(rows, weight, fp32=self.fp32_logits)

    def statistics(self, logits: Tensor, reference: Tensor | None, labels: Tensor) -> Tensor:
        """`[2, c]` or, if the call has references, `[5, c]` statistics of a chunk."""
        columns = {"vocab_start": self.vocab_start, "valid_columns": self.valid_columns}
        if not self.references:
            return self.kernels.shard_statistics(logits, labels, **columns)
        n = 0 if reference is None else reference.shape[0]
        if n == logits.shape[0]:
            return self.kernels.shard_statistics(
                logits, labels, reference_logits=reference, **columns
            )
        # Zeros for log-sum-exp of student and reference alike join to a KL of 0.
        stats = logits.new_zeros(5, logits.shape[0], dtype=torch.float64)
        if n:
            stats[:, :n] = self.kernels.shard_statistics(
                logits[:n], labels[:n], reference_logits=reference, **columns
            )
        stats[:2, n:] = self.kernels.shard_statistics(logits[n:], labels[n:], **columns)
        return stats

    def gradient(
        self,
        logits: Tensor,
        reference: Tensor | None,
        labels: Tensor,
        rows: RowStatistics,
        grad_margin: Tensor | None,
        grad_kl: Tensor | None,
        out: Tensor,
    ) -> Tensor:
        """Gradient of a chunk's logits `[c, V]`, written to `out`, which may be `logits`."""
        n = 0 if reference is None or grad_kl is None else reference.shape[0]
        for part in (slice(0, n), slice(n, logits.shape[0])):
            if part.start == part.stop:
                continue
            with_kl = part.start == 0 and n > 0
            self.kernels.logits_gradient(
                logits[part],
                labels[part],
                _slice(rows, part),
                None if grad_margin is None else grad_margin[part],
                grad_kl[part] if with_kl and grad_kl is not None else None,
                vocab_start=self.vocab_start,
                valid_columns=self.valid_columns,
                reference_logits=reference if with_kl else None,
                out=out[part],
            )
        return out


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
        group = plan.group if plan.sequence_parallel else None
        tokens = gather_tokens(hidden, group)
        if reference_hidden is not None:
            reference_hidden = gather_tokens(reference_hidden, group)
        if order is not None:
            tokens, labels = tokens[order], labels[order]
            if reference_hidden is not None:
                reference_hidden = reference_hidden[order[: plan.references]]
        stats: list[Tensor] = []
        student = plan.student(tokens, weight) if plan.whole else None
        logits = reference = None
        # The first chunk comes last: backward begins with it, and it is never the short one.
        first, *others = plan.chunks(tokens.shape[0])
        for chunk in (*others, first):
            del logits, reference
            logits = student[chunk] if student is not None else plan.student(tokens[chunk], weight)
            reference = plan.reference(chunk, reference_hidden, reference_weight)
            stats.append(plan.statistics(logits, reference, labels[chunk]))
        rows = plan.kernels.combine_statistics(
            gather_statistics(
                torch.cat([stats[-1], *stats[:-1]], 1) if others else stats[0], plan.group
            )
        )
        kept = (student if plan.whole else logits, reference) if plan.keep else None
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
        if order is None:
            return rows.margin, rows.kl
        place = torch.empty_like(order)
        place[order] = torch.arange(order.shape[0], device=order.device)
        return rows.margin[place], rows.kl[place]

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
        products = _Products(ctx, tokens, weight, order)
        gradients = student = None
        if plan.whole:
            student = plan.student(tokens, weight) if first is None else first
            first = None
            gradients = _gradient_place(student, weight)
        for chunk in plan.chunks(tokens.shape[0]):
            logits = student[chunk] if student is not None else first
            if logits is None:
                logits = plan.student(tokens[chunk], weight)
            if reference is None:
                reference = plan.reference(chunk, reference_hidden, reference_weight)
            out = _gradient_place(logits, weight) if gradients is None else gradients[chunk]
            plan.gradient(
                logits,
                reference,
                labels[chunk],
                _slice(rows, chunk),
                None if grad_margin is None else grad_margin[chunk],
                None if grad_kl is None else grad_kl[chunk],
                out,
            )
            first = logits = reference = None
            if gradients is None:
                products.add(out, chunk)
            del out
        del student
        if gradients is not None:
            products.add(gradients, slice(0, tokens.shape[0]))
        return *products.results(), None, None, None, None, None


class _Products:
    """Gradients of `hidden` and `weight`, from the gradients of the logits of successive tokens."""

    def __init__(self, ctx: Any, tokens: Tensor, weight: Tensor, order: Tensor | None) -> None:
        self.plan, self.main_grad = ctx.plan, ctx.main_grad
        self.tokens, self.weight, self.order = tokens, weight, order
        self.needs_hidden, self.needs_weight = ctx.needs_input_grad[:2]
        self.grad_tokens: Tensor | None = None
        self.work: dist.Work | None = None
        self.total: Tensor | None = ctx.main_grad

    def add(self, gradient: Tensor, chunk: slice) -> None:
        """Takes the gradient `[c, V]` of the logits of a chunk; the last one ends the tokens."""
        tokens, weight = self.tokens, self.weight
        if self.needs_hidden:
            if self.grad_tokens is None:
                self.grad_tokens = torch.empty_like(tokens)
            torch.mm(gradient, weight, out=self.grad_tokens[chunk])
            if chunk.stop == tokens.shape[0]:  # hidden behind the last product
                self.grad_tokens, self.work = _finish(self.grad_tokens, self.order, self.plan)
        if self.needs_weight:
            overwrite = self.total is None
            if self.total is None:
                # fp32 (or wider) if there are several parts to be summed.
                wide = torch.promote_types(weight.dtype, torch.float32)
                several = chunk.stop < tokens.shape[0]
                self.total = torch.empty_like(weight, dtype=wide if several else weight.dtype)
            add_weight_gradient(self.total, gradient, tokens[chunk], overwrite=overwrite)

    def results(self) -> tuple[Tensor | None, Tensor | None]:
        """What autograd is told, once the reduction is done."""
        if self.work is not None:
            self.work.wait()
        if not self.needs_weight:
            return self.grad_tokens, None
        if self.main_grad is not None:
            return self.grad_tokens, fused_weight_gradient(self.weight)
        assert self.total is not None
        return self.grad_tokens, self.total.to(self.weight.dtype)


def _gradient_place(logits: Tensor, weight: Tensor) -> Tensor:
    """Where the gradient of logits goes: over them, if it has their type."""
    return logits if logits.dtype == weight.dtype else torch.empty_like(logits, dtype=weight.dtype)


def _finish(
    grad_tokens: Tensor, order: Tensor | None, plan: HeadPlan
) -> tuple[Tensor, dist.Work | None]:
    """Puts the tokens back in their places and starts the sum over the vocabulary shards."""
    if order is not None:
        grad_tokens = torch.empty_like(grad_tokens).index_copy_(0, order, grad_tokens)
    return start_reduction(grad_tokens, plan.group, scatter=plan.sequence_parallel)


def _slice(rows: RowStatistics, part: slice) -> RowStatistics:
    """The statistics of some of the tokens."""
    return RowStatistics(
        rows.margin[part],
        rows.kl[part],
        rows.lse_rest[part],
        None if rows.lse_z is None else rows.lse_z[part],
        None if rows.lse_t is None else rows.lse_t[part],
    )
