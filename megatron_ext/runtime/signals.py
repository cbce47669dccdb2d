"""Whether any rank has been told to end, which is asked after every step."""

from __future__ import annotations

import torch
import torch.distributed as dist


def ask_at_once() -> None:
    """Ask in one collective and one look at the device.

    Megatron's own way makes a tensor for each rank of the world and reads each on its own: with
    ``--exit-signal-handler`` hundreds of kernels and waits for the device a step, at hundreds of ranks.
    """
    from megatron.training import dist_signal_handler

    def signals_received(self: dist_signal_handler.DistributedSignalHandler) -> list[bool]:
        if not dist.is_initialized():
            return [self._signal_received]
        device = dist_signal_handler.get_device()
        received = torch.tensor([self._signal_received], dtype=torch.int32, device=device)
        dist.all_reduce(received, op=dist.ReduceOp.MAX)
        return [bool(received.item())]

    dist_signal_handler.DistributedSignalHandler.signals_received = signals_received
