"""Attention within documents: a token of a packed sample attends to its own document alone.

Samples are packed: each is `s` tokens of documents that follow one another. With
`--dataloader-inter-document-masking` Megatron's datasets say where each begins (`cu_seqlens`), and with
`--chat-data-path` where each conversation does. The documents travel through Megatron's model as its
`packed_seq_params`; samples keep their shape `[s, b]`, so that all but the core attention is as it was.
Scores are computed for pairs of tokens of one document only: a sample costs the sum of its documents'
squared lengths in place of the square of its own.

Shapes: s sequence, b batch, h query heads and g key heads on this rank, d head size; n queries that are
the last of m keys.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from inspect import signature
from itertools import pairwise
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from megatron_ext.model.context_parallel import Attend


@dataclass(frozen=True)
class Lengths:
    """The documents of a sample that have queries, as the flash kernel takes them.

    Attributes:
        begin: position of the first of them in the sample.
        queries: int32 `[documents + 1]`, where each one's queries begin and the last one's end.
        keys: the same of the keys, from `begin` on.
        longest_query: queries of the document that has most.
        longest_key: keys of the document that has most.
    """

    begin: int
    queries: Tensor
    keys: Tensor
    longest_query: int
    longest_key: int


@dataclass
class Documents(PackedSeqParams):
    """Where the documents of a microbatch's samples lie; made by :meth:`from_lengths`.

    Attributes:
        bounds: for each of the `b` samples where its documents begin, in order, and at the end its length.
    """

    bounds: tuple[tuple[int, ...], ...] = ()
    _lengths: dict[tuple[int, int, int], Lengths] = field(default_factory=dict, repr=False)

    @classmethod
    def from_lengths(cls, cu_seqlens: Tensor) -> Documents:
        """Documents as Megatron's datasets give them.

        Args:
            cu_seqlens: int32 `[b, s + 1]` on the host. A row begins with 0 and the ends of the sample's
                documents, of which `s` is the last one; it is filled up with `s`.
        """
        bounds = tuple(tuple(torch.unique_consecutive(row).tolist()) for row in cu_seqlens)
        length = cu_seqlens.shape[1] - 1
        assert all(row[0] == 0 and row[-1] == length for row in bounds), "expected whole samples"
        # Megatron reads the lengths to make the rotary angles, which here are of positions in the sample:
        # rotation is relative, so a document may begin at any of them.
        return cls(qkv_format="sbhd", max_seqlen_q=length, max_seqlen_kv=length, bounds=bounds)

    def joined(self) -> Tensor:
        """int32 `[documents + 1]`: 0 and the ends of all documents, were the samples one after the other."""
        ends, before = [0], 0
        for row in self.bounds:
            ends += [before + end for end in row[1:]]
            before = ends[-1]
        return torch.tensor(ends, dtype=torch.int32)

    def parts(self, sample: int, first: int, end: int) -> Iterator[tuple[int, int]]:
        """Where the documents begin and end that have tokens from `first` to `end`, up to there."""
        row = self.bounds[sample]
        for start, stop in pairwise(row):
            if first < stop and start < end:
                yield start, min(stop, end)

    def lengths(self, sample: int, first: int, end: int, device: torch.device) -> Lengths:
        """Those documents, for queries that are the positions from `first` on; made once for all layers."""
        place = sample, first, end
        if place not in self._lengths:
            parts = list(self.parts(*place))
            begin = parts[0][0]
            queries = [0, *(stop - first for _, stop in parts)]
            keys = [0, *(stop - begin for _, stop in parts)]
            ends = torch.tensor([queries, keys], dtype=torch.int32)
            if device.type == "cuda":
                ends = ends.pin_memory().to(device, non_blocking=True)
            longest = (max(b - a for a, b in pairwise(row)) for row in (queries, keys))
            self._lengths[place] = Lengths(begin, ends[0], ends[1], *longest)
        return self._lengths[place]


def attend_within(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    documents: Documents,
    attend: Attend,
    flash: bool,
    scale: float | None,
) -> Tensor:
    """Causal attention of each token to its own document.

    Args:
        query: `[n, b, h, d]`, the last positions of the keys.
        key: `[m, b, g, d]`, the first positions of the samples.
        value: `[m, b, g, d]`.
        documents: Of the `b` samples.
        attend: Causal attention in one document.
        flash: Attend to all documents of a sample at once, by the flash kernel, in place of `attend`. A
            GPU has it for half precision, without dropout.
        scale: Factor on the flash kernel's scores; `1 / sqrt(d)` where None.

    Returns:
        Context `[n, b, h, d]`.
    """
    assert len(documents.bounds) == query.shape[1], "expected documents of as many samples"
    end, first = len(key), len(key) - len(query)
    contexts = []
    for sample in range(query.shape[1]):
        own = slice(sample, sample + 1)
        if flash:
            lengths = documents.lengths(sample, first, end, query.device)
            keys = slice(lengths.begin, end)
            context = _flash(
                query[:, sample], key[keys, sample], value[keys, sample], lengths, scale
            )
            contexts.append(context[:, None])
            continue
        within = []
        for start, stop in documents.parts(sample, first, end):
            queries = slice(max(start - first, 0), stop - first)
            within.append(attend(query[queries, own], key[start:stop, own], value[start:stop, own]))
        contexts.append(_joined(within, dim=0))
    return _joined(contexts, dim=1)


def _joined(parts: list[Tensor], *, dim: int) -> Tensor:
    """The only one as it is, without a copy."""
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=dim)


def _flash(
    query: Tensor, key: Tensor, value: Tensor, lengths: Lengths, scale: float | None
) -> Tensor:
    """Context `[n, h, d]` of the queries of one sample."""
    from torch.nn.attention.varlen import varlen_attn  # brings torch's compiler

    attend: Any = varlen_attn
    # Its mask, like causal attention here, ends a document's queries with its keys.
    context: Tensor = attend(
        query,
        key,
        value,
        lengths.queries,
        lengths.keys,
        lengths.longest_query,
        lengths.longest_key,
        scale=scale,
        window_size=(-1, 0),
        **_grouped(attend),
    )
    return context


@cache
def _grouped(attend: Any) -> dict[str, bool]:
    """Lets query heads share key heads; torch 2.11 does so unasked."""
    return {"enable_gqa": True} if "enable_gqa" in signature(attend).parameters else {}
