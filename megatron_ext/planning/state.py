"""Bytes of weights, gradients and optimizer on one rank, exactly as Megatron-Core 0.19.2 allocates them.

With the distributed optimizer weights and gradients of a model chunk lie in two buffers of equal
length, in the reverse order of the parameters: each begins at a multiple of 64 elements, each bucket
ends at a multiple of `lcm(DP, 128)` (`megatron.core.optimizer.param_layout`), and each data-parallel
rank keeps the optimizer's state of an equal part of every bucket.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from megatron_ext.planning.architecture import Architecture, Tensor
from megatron_ext.planning.layout import Layout

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


def default_bucket(ranks: int) -> int:
    """Elements of a bucket where no flag says it, as Megatron's `resolve_ddp_bucket_size` chooses them."""
    return max(40_000_000, 1_000_000 * ranks)


def _up(value: int, unit: int) -> int:
    return -(-value // unit) * unit


def buffers(arch: Architecture, layout: Layout, stage: int) -> list[list[Bucket]]:
    """The buffers of a stage's chunks under the distributed optimizer.

    Gradients are in buckets where their reduction overlaps, and there only in the first chunk of the
    first stage (`DistributedDataParallel`, "turn off bucketing").
    """
    ranks = layout.shards
    bucketed = layout.overlap_gradients and stage == 0
    size = layout.bucket_size or default_bucket(ranks)
    return [
        lay_out(
            arch.chunk_tensors(stage, chunk, tp=layout.tp, pp=layout.pp, vpp=layout.vpp),
            ranks=ranks,
            bucket_size=size if bucketed and chunk == 0 else None,
        )
        for chunk in range(layout.vpp)
    ]


def state_bytes(
    arch: Architecture, layout: Layout, stage: int, *, shard: int = 0
) -> dict[str, int]:
    """Bytes of weights, gradients and optimizer on one rank.

    A parameter takes 18 bytes in half precision, or `6 + 12 / DP` with the distributed optimizer
    (Megatron-Core user guide, "Distributed Optimizer"): 2 for the weight, 4 for its fp32 gradient, 4
    for the fp32 master and 8 for Adam's moments. In fp32 the weight is its own master. Adam's step
    counters, 4 bytes a tensor with torch's optimizer, are left out.
    """
    moments = 12 if layout.half else 8
    if layout.distributed_optimizer:
        laid = buffers(arch, layout, stage)
        elements = sum(buckets[-1].end for buckets in laid)
        own = sum(b.shard(shard, layout.shards) for buckets in laid for b in buckets)
    else:
        elements = arch.stage_parameters(stage, tp=layout.tp, pp=layout.pp, vpp=layout.vpp)
        own = elements
    return {
        "weights": layout.element * elements,
        "gradients": layout.gradient * elements,
        "optimizer": moments * own,
    }
