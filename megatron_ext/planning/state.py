"""Bytes of weights, gradients and optimizer on one rank, exactly as Megatron-Core 0.19.2 allocates them.

With the distributed optimizer weights and gradients of a model chunk lie in two buffers of equal
length, in the reverse order of the parameters: each begins at a multiple of 64 elements, each bucket
ends at a multiple of `lcm(DP, 128)` (`megatron.core.optimizer.param_layout`), and each data-parallel
rank keeps the optimizer's state of an equal part of every bucket. Experts that are spread otherwise than
the rest have buffers and data-parallel ranks of their own.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

from megatron_ext.buckets import default_bucket
from megatron_ext.planning.architecture import Architecture
from megatron_ext.planning.layout import Layout, Place
from megatron_ext.planning.split import Split, Tensor

_START = 64
_END = 128


@dataclass
class Bucket:
    """A part of a buffer whose gradients are reduced together.

    Attributes:
        start: first element.
        end: behind the last element, padding included.
        spans: first element and the one behind the last of each parameter.
    """

    start: int
    end: int
    spans: list[tuple[int, int]]

    def shard(self, rank: int, ranks: int) -> int:
        """Elements whose optimizer state a data-parallel rank keeps; padding has none."""
        part = (self.end - self.start) // ranks
        low = self.start + rank * part
        return sum(max(0, min(b, low + part) - max(a, low)) for a, b in self.spans)


def lay_out(tensors: list[Tensor], *, ranks: int, bucket_size: int | None) -> list[Bucket]:
    """Where the distributed optimizer puts the parameters of a model chunk.

    Args:
        tensors: in the order of `named_parameters`.
        ranks: data-parallel size, times the context-parallel one.
        bucket_size: elements after which a bucket ends; None for one bucket.
    """
    unit = math.lcm(ranks, _END)
    buckets = [Bucket(0, 0, [])]

    def close(end: int) -> int:
        buckets[-1].end = _up(end, unit)
        buckets.append(Bucket(buckets[-1].end, 0, []))
        return buckets[-1].start

    cursor = 0
    for tensor in reversed(tensors):
        cursor = _up(cursor, _START)
        if (
            tensor.shared and buckets[-1].spans
        ):  # its gradient is reduced between the stages as well
            cursor = close(cursor)
        bucket = buckets[-1]
        bucket.spans.append((cursor, cursor + tensor.elements))
        cursor += tensor.elements
        full = bucket_size is not None and cursor - bucket.start >= bucket_size
        if full or tensor.shared:
            cursor = close(cursor)
    if buckets[-1].spans:
        close(cursor)
    return buckets[:-1]


def _up(value: int, unit: int) -> int:
    return -(-value // unit) * unit


@dataclass(frozen=True)
class Buffer:
    """A buffer of weights, and one of as many gradients.

    Attributes:
        buckets: its parts.
        ranks: data-parallel ranks that share the optimizer's state of it.
        expert: whether these are the ranks of experts.
    """

    buckets: list[Bucket]
    ranks: int
    expert: bool

    def own(self, place: Place) -> int:
        """Elements whose optimizer state a rank keeps."""
        shard = place.expert_shard if self.expert else place.shard
        return sum(bucket.shard(shard, self.ranks) for bucket in self.buckets)


@dataclass(frozen=True)
class Sharing:
    """What of a layout decides about the buffers of the distributed optimizer.

    Attributes:
        split: how the model is divided.
        ranks: data-parallel ranks, times the context-parallel ones.
        expert_ranks: those of experts.
        bucket_size: elements after which a bucket ends; None for one bucket.
    """

    split: Split
    ranks: int
    expert_ranks: int
    bucket_size: int | None

    @classmethod
    def of(cls, layout: Layout) -> Sharing:
        """That of a layout; gradients are in buckets where their reduction overlaps."""
        size = layout.bucket_size or default_bucket(layout.shards)
        bucketed = size if layout.overlap_gradients else None
        return cls(layout.split, layout.shards, layout.expert_shards, bucketed)


def buffers(arch: Architecture, sharing: Sharing, stage: int) -> list[Buffer]:
    """The buffers of a stage's chunks under the distributed optimizer.

    Only the first chunk of the first stage has buckets (`DistributedDataParallel`, "turn off bucketing").
    """
    found = []
    for chunk in range(sharing.split.vpp):
        tensors = arch.chunk_tensors(stage, chunk, sharing.split)
        for expert, ranks in ((False, sharing.ranks), (True, sharing.expert_ranks)):
            laid = lay_out(
                [tensor for tensor in tensors if tensor.expert == expert],
                ranks=ranks,
                bucket_size=sharing.bucket_size if stage == 0 and chunk == 0 else None,
            )
            if laid:
                found.append(Buffer(laid, ranks, expert))
    return found


# Layouts that are compared differ in what has no part in this, and experts are thousands of tensors.
@functools.lru_cache(maxsize=1024)
def _counts(arch: Architecture, sharing: Sharing, place: Place) -> tuple[int, int]:
    """Elements of a rank's buffers, and those of whose optimizer state it keeps."""
    laid = buffers(arch, sharing, place.stage)
    return sum(buffer.buckets[-1].end for buffer in laid), sum(b.own(place) for b in laid)


def state_bytes(
    arch: Architecture, layout: Layout, stage: int, *, place: Place | None = None
) -> dict[str, int]:
    """Bytes of weights, gradients and optimizer on one rank.

    A parameter takes 18 bytes in half precision, or `6 + 12 / DP` with the distributed optimizer
    (Megatron-Core user guide, "Distributed Optimizer"): 2 for the weight, 4 for its fp32 gradient, 4
    for the fp32 master and 8 for Adam's moments. In fp32 the weight is its own master. Adam's step
    counters, 4 bytes a tensor with torch's optimizer, are left out.

    Args:
        arch: the model.
        layout: the layout.
        stage: pipeline rank.
        place: of the rank; by default the stage's first.
    """
    moments = 12 if layout.half else 8
    if layout.distributed_optimizer:
        elements, own = _counts(arch, Sharing.of(layout), place or Place(stage, 0, 0))
    else:
        elements = own = arch.stage_parameters(stage, layout.split)
    return {
        "weights": layout.element * elements,
        "gradients": layout.gradient * elements,
        "optimizer": moments * own,
    }
