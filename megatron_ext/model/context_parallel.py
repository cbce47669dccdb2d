"""Causal attention over a sequence that is split across context-parallel ranks.

Megatron cuts a sequence into `2 * cp` chunks and gives rank r chunks r and `2 * cp - 1 - r`, so that all
ranks have as many pairs of query and key before them. Every rank gathers the keys and values of the
whole sequence and attends with its own queries, a chunk at a time, to the prefix that ends with the
chunk. With g key heads for h query heads that moves `2 g / h` of a hidden state for each token and
layer, once forward and, for the gradient, twice backward.

Shapes: s tokens of a sequence, of which `s / cp` are on this rank; c = s / (2 cp) tokens of a chunk;
b batch, h query heads and g key heads on this rank, d head size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

# Causal attention of queries `[n, b, h, d]` to keys and values `[m, b, g, d]` that end with the same
# token: context `[n, b, h, d]`.
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def attend_over_ranks(
    query: Tensor, key: Tensor, value: Tensor, attend: Attend, *, group: ProcessGroup
) -> Tensor:
    """Attend causally to the tokens of all ranks.

    Args:
        query: `[s / cp, b, h, d]`, this rank's two chunks.
        key: `[s / cp, b, g, d]`.
        value: `[s / cp, b, g, d]`.
        attend: Attention on one device.
        group: The context-parallel ranks.

    Returns:
        Context `[s / cp, b, h, d]` of this rank's queries.
    """
    ranks, rank = group.size(), group.rank()
    keys, values = _Gather.apply(key, value, group)
    chunk = len(query) // 2
    # What the kernels keep for their backward pass of the gathered keys and values is s tokens a
    # layer on every rank, which would undo what splitting the sequence is for.
    gathered = _Regathered(keys, values, key.detach(), value.detach(), group)
    contexts = []
    with torch.autograd.graph.saved_tensors_hooks(gathered.pack, gathered.unpack):
        for part, index in zip(query.split(chunk), (rank, 2 * ranks - 1 - rank), strict=True):
            end = (index + 1) * chunk
            contexts.append(attend(part, keys[:end], values[:end]))
    return torch.cat(contexts)


def _gather(key: Tensor, value: Tensor, group: ProcessGroup) -> tuple[Tensor, Tensor]:
    """Keys and values `[s, b, g, d]` in the order of the sequence, as views of one buffer."""
    mine = torch.stack((key, value))
    parts = mine.new_empty(group.size() * 2, *key.shape)
    torch.distributed.all_gather_into_tensor(parts, mine, group=group)
    halves = parts.unflatten(1, (2, -1)).unflatten(0, (-1, 2))  # [cp, 2, 2, c, b, g, d]
    first, second = halves.select(2, 0), halves.select(2, 1).flip(0)
    ordered = torch.cat((first.transpose(0, 1), second.transpose(0, 1)), dim=1)
    keys, values = ordered.flatten(1, 2)
    return keys, values


class _Gather(torch.autograd.Function):
    """Gather forward; backward, sum the gradient over the ranks and keep this rank's part."""

    @staticmethod
    def forward(ctx: Any, key: Tensor, value: Tensor, group: ProcessGroup) -> tuple[Tensor, Tensor]:
        ctx.group = group
        return _gather(key, value, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        ranks = ctx.group.size()
        chunks = torch.stack(grads).unflatten(1, (2 * ranks, -1))  # [2, 2 cp, c, b, g, d]
        first, second = chunks[:, :ranks], chunks[:, ranks:].flip(1)
        parts = torch.stack((first, second), dim=2).transpose(0, 1)  # [cp, 2, 2, c, b, g, d]
        parts = parts.flatten(2, 3).flatten(0, 1)
        mine = parts.new_empty(2, *parts.shape[1:])
        torch.distributed.reduce_scatter_tensor(mine, parts, group=ctx.group)
        return mine[0], mine[1], None


class _Regathered:
    """Keeps this rank's keys and values in the place of all, and gathers them again when they are needed.

    Args:
        keys: Gathered, `[s, b, g, d]`.
        values: Gathered.
        key: This rank's, `[s / cp, b, g, d]`.
        value: This rank's.
        group: The context-parallel ranks.
    """

    def __init__(
        self, keys: Tensor, values: Tensor, key: Tensor, value: Tensor, group: ProcessGroup
    ) -> None:
        self._storage = keys.untyped_storage().data_ptr()
        assert values.untyped_storage().data_ptr() == self._storage
        self._own = key, value, group
        self._packed = self._unpacked = 0
        self._again: Tensor | None = None

    def pack(self, saved: Tensor) -> Any:
        """What is kept of a tensor that a kernel saves: where it lies, if in the gathered ones."""
        if saved.untyped_storage().data_ptr() != self._storage:
            return saved
        self._packed += 1
        return saved.shape, saved.stride(), saved.storage_offset()

    def unpack(self, kept: Any) -> Tensor:
        """The tensor again. Backward passes take the same steps on all ranks, so all gather together."""
        if isinstance(kept, Tensor):
            return kept
        if self._again is None:
            self._again = _gather(*self._own)[0]
        again = self._again.as_strided(*kept)
        self._unpacked += 1
        if self._unpacked % self._packed == 0:
            self._again = None
        return again
