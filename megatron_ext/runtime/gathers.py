"""The parameters that the distributed optimizer has spread, all-gathered while the reference works."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterable
from typing import Any


def gather_ahead(args: Namespace, chunks: Iterable[Any]) -> None:
    """Start all of a step's parameter all-gathers under ``--overlap-param-gather``.

    By default Megatron starts the first where the model's forward pass begins, which then waits for it, and
    each further one when the one before it is done: what a network cannot bring within a layer's time is
    waited for. The pass of a reference, which needs none of these parameters, leaves time for all.

    Nothing happens where the hooks that wait for the parameters are off, as in a run's first step, or where
    Megatron starts all of a chunk's at once by itself (``--align-param-gather``, in an interleaved pipeline;
    ``--overlap-param-gather-with-optimizer-step``).

    Args:
        args: Megatron's validated arguments.
        chunks: the model's chunks on this rank, as Megatron's loop has them.
    """
    if not (args.overlap_param_gather and args.use_distributed_optimizer):
        return
    if args.align_param_gather or args.overlap_param_gather_with_optimizer_step:
        return
    for chunk in chunks:
        if not chunk.remove_forward_pre_hook_handles:
            continue
        for groups in (chunk.bucket_groups, chunk.expert_parallel_bucket_groups):
            for group in reversed(groups):  # in the order of the forward pass
                # Its hook would find that it was started already, and warn.
                group.next_param_gather_bucket_group = None
                if not group.param_gather_dispatched:
                    group.start_param_sync()
