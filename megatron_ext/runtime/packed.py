"""The distributed optimizer's reshardable state, taken from where it is.

For a checkpoint of `--dist-ckpt-optim-fully-reshardable` Megatron-Core 0.19.2 gathers the buckets of a buffer
without the padding at their ends, and then looks for the parameters at their places with it. Behind the first
padded bucket every parameter would get a piece of its neighbours' moments and fp32 weights, without a word:
the run that saves goes on well, the one that loads trains other weights. Buckets end at multiples of 128 and
of the number of data-parallel ranks, so usual sizes on 64 ranks need no padding, and on 24 they do.
"""

from __future__ import annotations

from typing import Any

import torch

type Places = dict[torch.nn.Parameter, tuple[int, int, int]]


def places(buffer: Any) -> Places:
    """Where a buffer's parameters lie once the padding between its buckets is gone.

    Args:
        buffer: Megatron's `_ParamAndGradBuffer`.

    Returns:
        Start, end and bucket of each parameter, in the order of `buffer.param_index_map`.
    """
    padding, packed = [], 0
    for bucket in buffer.buckets:
        padding.append(bucket.offset - packed)
        packed += bucket.numel_unpadded
    return {
        parameter: (start - padding[bucket], end - padding[bucket], bucket)
        for parameter, (start, end, bucket) in buffer.param_index_map.items()
    }


def apply() -> None:
    """Let Megatron's distributed optimizer look there; called once before training."""
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    sharded_state = DistributedOptimizer.sharded_param_state_fully_reshardable

    def of_packed(self: DistributedOptimizer, *args: Any, **kwargs: Any) -> Any:
        padded = [buffer.param_index_map for buffer in self.buffers]
        try:
            for buffer in self.buffers:
                buffer.param_index_map = places(buffer)
            return sharded_state(self, *args, **kwargs)
        finally:
            for buffer, before in zip(self.buffers, padded, strict=True):
                buffer.param_index_map = before

    DistributedOptimizer.sharded_param_state_fully_reshardable = of_packed
