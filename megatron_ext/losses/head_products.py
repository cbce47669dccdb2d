"""The gradients of hidden states and weight, from those of the logits, block by block.

T tokens, H hidden size, V vocabulary columns of this shard; c tokens and v columns of a block.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_ext.losses.head_linear import (
    add_product,
    fused_weight_gradient,
    start_reduction,
)


class HeadProducts:
    """Sums `dlogits weight` and `dlogits^T hidden` over blocks that come row by row.

    What several blocks are summed in is fp32 or wider.

    Args:
        tokens: `[T, H]`, the hidden states in the order of the blocks.
        weight: `[V, H]`.
        order: `[T]`, the places of these tokens in the batch; None: as they are.
        main_grad: `[V, H]`, to add the weight's gradient to; None: a new tensor.
        needs: Whether the gradient of the hidden states, and of the weight, is wanted.
        group: Tensor-parallel group; None is one shard.
        scatter: Sequence parallelism: each rank gets the gradient of its own tokens.
    """

    def __init__(
        self,
        tokens: Tensor,
        weight: Tensor,
        order: Tensor | None,
        *,
        main_grad: Tensor | None,
        needs: tuple[bool, bool],
        group: dist.ProcessGroup | None,
        scatter: bool,
    ) -> None:
        self.tokens, self.weight, self.order = tokens, weight, order
        self.group, self.scatter = group, scatter
        self.needs_hidden, self.needs_weight = needs
        self.main_grad = self.total = main_grad
        self.grad_tokens: Tensor | None = None
        self.work: dist.Work | None = None

    def add(self, gradient: Tensor, rows: slice, columns: slice) -> None:
        """Take the gradient `[c, v]` of the logits of a block; the last one ends the sums."""
        if self.needs_hidden:
            self._add_hidden(gradient, rows, columns)
            last = rows.stop == self.tokens.shape[0] and columns.stop == self.weight.shape[0]
            if last:  # hidden behind the last product
                self._finish_hidden()
        if self.needs_weight:
            if self.total is None:
                several = rows.stop < self.tokens.shape[0]
                dtype = _wide(self.weight) if several else self.weight.dtype
                self.total = torch.empty_like(self.weight, dtype=dtype)
            overwrite = self.main_grad is None and rows.start == 0
            add_product(self.total[columns], gradient.t(), self.tokens[rows], overwrite=overwrite)

    def _add_hidden(self, gradient: Tensor, rows: slice, columns: slice) -> None:
        if self.grad_tokens is None:
            several = columns.stop < self.weight.shape[0]
            dtype = _wide(self.tokens) if several else self.tokens.dtype
            self.grad_tokens = torch.empty_like(self.tokens, dtype=dtype)
        overwrite = columns.start == 0
        add_product(self.grad_tokens[rows], gradient, self.weight[columns], overwrite=overwrite)

    def _finish_hidden(self) -> None:
        """Put the tokens back in their places and start the sum over the vocabulary shards."""
        assert self.grad_tokens is not None
        summed = self.grad_tokens.to(self.tokens.dtype)
        if self.order is not None:
            summed = torch.empty_like(summed).index_copy_(0, self.order, summed)
        self.grad_tokens, self.work = start_reduction(summed, self.group, scatter=self.scatter)

    def sums(self) -> tuple[Tensor | None, Tensor | None]:
        """The gradients once reduced: `[T, H]`, or this rank's part, and `[V, H]` in the type of the sum."""
        if self.work is not None:
            self.work.wait()
            self.work = None
        return self.grad_tokens, self.total

    def results(self) -> tuple[Tensor | None, Tensor | None]:
        """What autograd is told, once the reduction is done."""
        self.sums()
        if not self.needs_weight:
            return self.grad_tokens, None
        if self.main_grad is not None:
            return self.grad_tokens, fused_weight_gradient(self.weight)
        assert self.total is not None
        return self.grad_tokens, self.total.to(self.weight.dtype)


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)
