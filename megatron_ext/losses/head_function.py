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
from megatron_ext.losses.vocab_parallel import (
    RowStatistics,
    combine_statistics,
    gather_statistics,
)


@dataclass(frozen=True)
class HeadPlan:
    """All that one call of the head has decided; see `unlearning_head`."""

    kernels: ModuleType
    group: dist.ProcessGroup | None
    sequence_parallel: bool
    vocab_start: int
    valid_columns: int
    references: int
    chunk_size: int
    fp32_logits: bool
    fuse_weight_gradient: bool
    keep: bool

    def chunks(self, tokens: int) -> Iterator[slice]:
        """Slices of the sorted tokens."""
        return (
            slice(i, min(i + self.chunk_size, tokens))
            for i in range(0, max(tokens, 1), self.chunk_size)
        )

    def logits(
        self,
        chunk: slice,
        hidden: Tensor,
        weight: Tensor,
        reference_hidden: Tensor | None,
        reference_weight: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        """Logits of a chunk's tokens `[c, V]`, and of the reference for the first of them."""
        logits = project(hidden[chunk], weight, fp32=self.fp32_logits)
        if reference_hidden is None or reference_weight is None or chunk.start >= self.references:
            return logits, None
        rows = reference_hidden[chunk.start : min(chunk.stop, self.references)]
        return logits, project(rows, reference_weight, fp32=self.fp32_logits)

    def statistics(self, logits: Tensor, reference: Tensor | None, labels: Tensor) -> Tensor:
        """`[2, c]` or, if the call has references, `[5, c]` statistics of a chunk."""
        columns = {"vocab_start": self.vocab_start, "valid_columns": self.valid_columns}
        if not self.references:
            return self.kernels.shard_statistics(logits, labels, **columns)
        # Zeros for log-sum-exp of student and reference alike join to a KL of 0.
        stats = logits.new_zeros(5, logits.shape[0], dtype=torch.float64)
        n = 0 if reference is None else reference.shape[0]
        if n:
            stats[:, :n] = self.kernels.shard_statistics(
                logits[:n], labels[:n], reference_logits=reference, **columns
            )
        if n < logits.shape[0]:
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
        dtype: torch.dtype,
    ) -> Tensor:
        """Gradient of a chunk's logits `[c, V]`, in their place if the type allows."""
        out = logits if logits.dtype == dtype else torch.empty_like(logits, dtype=dtype)
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
        inputs = (tokens, weight, reference_hidden, reference_weight)
        stats, kept = [], None
        for chunk in plan.chunks(tokens.shape[0]):
            logits, reference = plan.logits(chunk, *inputs)
            stats.append(plan.statistics(logits, reference, labels[chunk]))
            kept = (logits, reference) if plan.keep else None
            del logits, reference
        rows = combine_statistics(
            gather_statistics(torch.cat(stats, 1) if len(stats) != 1 else stats[0], plan.group)
        )
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
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        grad_tokens = torch.empty_like(tokens) if needs_hidden else None
        several = plan.chunk_size < tokens.shape[0]
        total = _weight_total(ctx.main_grad, weight, several) if needs_weight else None
        result, work = grad_tokens, None
        for chunk in plan.chunks(tokens.shape[0]):
            logits, reference = (
                kept
                if kept is not None
                else plan.logits(chunk, tokens, weight, reference_hidden, reference_weight)
            )
            kept = None
            gradient = plan.gradient(
                logits,
                reference,
                labels[chunk],
                _slice(rows, chunk),
                None if grad_margin is None else grad_margin[chunk],
                None if grad_kl is None else grad_kl[chunk],
                weight.dtype,
            )
            del logits, reference
            if grad_tokens is not None:
                torch.mm(gradient, weight, out=grad_tokens[chunk])
                if chunk.stop == tokens.shape[0]:  # hidden behind the last product
                    result, work = _finish(grad_tokens, order, plan)
            if total is not None:
                add_weight_gradient(
                    total,
                    gradient,
                    tokens[chunk],
                    overwrite=ctx.main_grad is None and chunk.start == 0,
                )
            del gradient
        if work is not None:
            work.wait()
        grad_weight = None
        if total is not None:
            fused = ctx.main_grad is not None
            grad_weight = fused_weight_gradient(weight) if fused else total.to(weight.dtype)
        return result, grad_weight, None, None, None, None, None


def _finish(
    grad_tokens: Tensor, order: Tensor | None, plan: HeadPlan
) -> tuple[Tensor, dist.Work | None]:
    """Puts the tokens back in their places and starts the sum over the vocabulary shards."""
    if order is not None:
        grad_tokens = torch.empty_like(grad_tokens).index_copy_(0, order, grad_tokens)
    return start_reduction(grad_tokens, plan.group, scatter=plan.sequence_parallel)


def _weight_total(main_grad: Tensor | None, weight: Tensor, several: bool) -> Tensor:
    """What the gradient of the weight is summed in: fp32 (or wider) if there are several parts."""
    if main_grad is not None:
        return main_grad
    dtype = torch.promote_types(weight.dtype, torch.float32) if several else weight.dtype
    return torch.empty_like(weight, dtype=dtype)


def _slice(rows: RowStatistics, part: slice) -> RowStatistics:
    """The statistics of some of the tokens."""
    return RowStatistics(
        rows.margin[part],
        rows.kl[part],
        rows.lse_rest[part],
        None if rows.lse_z is None else rows.lse_z[part],
        None if rows.lse_t is None else rows.lse_t[part],
    )
