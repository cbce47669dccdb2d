"""Megatron's data loaders: their random numbers, their end, and how far ahead of the step they read."""

from __future__ import annotations

from argparse import Namespace
from typing import Any

import torch

# Microbatches that wait for the step on a rank, at most. Until it is copied to pinned memory each holds a
# file descriptor for each of its tensors, and many systems allow a process 1,024.
MOST_AHEAD = 64


def prepare() -> None:
    """Give each data loader a random generator of its own, and a run that is at its end one without samples.

    torch draws a seed for workers whenever an iterator is made, by default from the generator whose state
    is in the checkpoint: each resume would leave it one draw further than a run that was never stopped,
    on those ranks alone that read data.

    A run that was stopped after its last step has its last validation still before it; Megatron's sampler
    fails where no training sample is left.
    """
    import megatron.training.training as loop

    build = loop.build_pretraining_data_loader

    def build_prepared(dataset: Any, consumed_samples: int) -> Any:
        args = loop.get_args()
        at_end = dataset is not None and consumed_samples >= len(dataset)
        if at_end and args.dataloader_type == "single":
            return []
        loader = build(dataset, consumed_samples)
        if loader is not None:
            loader.generator = torch.Generator().manual_seed(args.seed)
        return loader

    loop.build_pretraining_data_loader = build_prepared


def fetch_whole_steps() -> None:
    """Let the workers of data loaders have the next step's microbatches ready; for steps that read all first.

    Of a worker torch keeps two microbatches waiting. While a step computes, that is all that the workers do;
    the rest of the next step's would be read while the GPU waits.
    """
    import megatron.training.training as loop

    build = loop.build_pretraining_data_loader

    def build_ahead(dataset: Any, consumed_samples: int) -> Any:
        loader = build(dataset, consumed_samples)
        workers = getattr(loader, "num_workers", 0)
        if workers:  # torch reads this when the iterator is made
            wanted = -(-_microbatches(loop.get_args()) // workers)
            loader.prefetch_factor = max(loader.prefetch_factor, wanted)
        return loader

    loop.build_pretraining_data_loader = build_ahead


def _microbatches(args: Namespace) -> int:
    """What a rank reads for a step or a validation step, as far as it may wait."""
    # Such masks take a byte for each pair of tokens.
    if args.create_attention_mask_in_dataloader:
        return 0
    step = args.global_batch_size // (args.micro_batch_size * args.data_parallel_size)
    check = args.eval_global_batch_size // (args.eval_micro_batch_size * args.data_parallel_size)
    return min(MOST_AHEAD, max(step, check))
