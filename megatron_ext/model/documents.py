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

from dataclasses import dataclass, field
from functools import cache
from inspect import signature
from itertools import accumulate, pairwise
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.enums import AttnBackend
from torch import Tensor

from megatron_ext.model.context_parallel import Attend

FLASH_HEAD = 256  # the largest that flash's kernels know, and cuDNN's


@dataclass(frozen=True)
class Spans:
    """The documents of a sample that have some of its tokens as queries.

    Attributes:
        begin: position in the sample where the first of them begins.
        queries: number of each one's queries, which are its last tokens.
        keys: number of each one's keys.
    """

    begin: int
    queries: tuple[int, ...]
    keys: tuple[int, ...]

    def ends(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """int32 `[documents + 1]` of queries and of keys: 0 and where those of each document end."""
        rows = [[0, *accumulate(counts)] for counts in (self.queries, self.keys)]
        found = _moved(torch.tensor(rows, dtype=torch.int32), device)
        return found[0], found[1]


@dataclass
class Documents(PackedSeqParams):
    """Where the documents of a microbatch's samples lie; made by :meth:`from_lengths`.

    Attributes:
        bounds: for each of the `b` samples where its documents begin, in order, and at the end its length.
    """

    bounds: tuple[tuple[int, ...], ...] = ()
    _spans: dict[tuple[int, int, int], Spans] = field(default_factory=dict, repr=False)
    _ends: dict[Spans, tuple[Tensor, Tensor]] = field(default_factory=dict, repr=False)
    _packed: PackedSeqParams | None = field(default=None, repr=False)

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

    def packed(self, device: torch.device) -> PackedSeqParams:
        """Of all samples one after the other, for Transformer Engine; made once for all layers."""
        if self._packed is None:
            longest = max(stop - start for row in self.bounds for start, stop in pairwise(row))
            ends = _moved(self.joined(), device)
            self._packed = PackedSeqParams(
                qkv_format="thd",
                cu_seqlens_q=ends,
                cu_seqlens_kv=ends,
                max_seqlen_q=longest,
                max_seqlen_kv=longest,
            )
        return self._packed

    def spans(self, sample: int, first: int, end: int) -> Spans:
        """The documents of a sample with queries from `first` to `end`; made once for all layers."""
        place = sample, first, end
        if place not in self._spans:
            row = self.bounds[sample]
            own = [
                (start, min(stop, end))
                for start, stop in pairwise(row)
                if first < stop and start < end
            ]
            self._spans[place] = Spans(
                begin=own[0][0],
                queries=tuple(stop - max(start, first) for start, stop in own),
                keys=tuple(stop - start for start, stop in own),
            )
        return self._spans[place]

    def ends(self, spans: Spans, device: torch.device) -> tuple[Tensor, Tensor]:
        """See there; copied to the device once for all layers."""
        if spans not in self._ends:
            self._ends[spans] = spans.ends(device)
        return self._ends[spans]


def _moved(numbers: Tensor, device: torch.device) -> Tensor:
    """To the device, without a wait of the host."""
    if device.type != "cuda":
        return numbers
    return numbers.pin_memory().to(device, non_blocking=True)


def has_flash(query: Tensor, *, dropout: float, backend: AttnBackend) -> bool:
    """Whether a flash kernel for documents of many lengths computes this, and may.

    Args:
        query: `[n, b, h, d]`.
        dropout: Probability, of the attention's weights.
        backend: What the run asks for.
    """
    size = query.shape[3]
    return (
        query.is_cuda
        and query.dtype in (torch.float16, torch.bfloat16)
        and size <= FLASH_HEAD
        and size % 8 == 0  # for a single length torch pads it
        and dropout == 0
        and backend is not AttnBackend.unfused
        and torch.cuda.get_device_capability(query.device) >= (8, 0)
    )


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
    # Split, not sliced: the gradient of a slice is as large as all that it was cut from.
    samples = zip(query.unbind(1), key.unbind(1), value.unbind(1), strict=True)
    for sample, (queries, keys, values) in enumerate(samples):
        spans = documents.spans(sample, first, end)
        if spans.begin:
            keys, values = keys[spans.begin :], values[spans.begin :]
        if flash:
            ends = documents.ends(spans, query.device)
            contexts.append(_flash(queries, keys, values, spans, ends, scale))
            continue
        parts = zip(
            queries.split(spans.queries),
            keys.split(spans.keys),
            values.split(spans.keys),
            strict=True,
        )
        within = [attend(*(part[:, None] for part in own)) for own in parts]
        contexts.append(torch.cat(within)[:, 0])
    # A copy beside what the kernels keep, where there are several.
    return torch.stack(contexts, dim=1) if len(contexts) > 1 else contexts[0][:, None]


def _flash(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    spans: Spans,
    ends: tuple[Tensor, Tensor],
    scale: float | None,
) -> Tensor:
    """Context `[n, h, d]` of the queries of one sample."""
    from torch.nn.attention.varlen import varlen_attn  # brings torch's compiler

    attend: Any = varlen_attn
    # Its mask, like causal attention here, ends a document's queries with its keys.
    context: Tensor = attend(
        query,
        key,
        value,
        *ends,
        max(spans.queries),
        max(spans.keys),
        scale=scale,
        window_size=(-1, 0),
        **_grouped(attend),
    )
    return context


@cache
def _grouped(attend: Any) -> dict[str, bool]:
    """Lets query heads share key heads; torch 2.11 does so unasked."""
    return {"enable_gqa": True} if "enable_gqa" in signature(attend).parameters else {}
