"""Activation recompute of layers that hand a parameter on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def return_copies() -> None:
    """Let no recomputed function return a parameter itself.

    Feed-forward layers return their last bias beside their output, to be added later. As an output of
    Megatron's autograd function the bias counts as computed by it, so that with
    ``--recompute-modules mlp`` the backward pass would enter itself without end: the first step hangs, or
    the process crashes.
    """
    from megatron.core.tensor_parallel.random import CheckpointFunction

    forward = CheckpointFunction.forward

    def forward_with_copies(ctx: Any, function: Callable[..., Any], *rest: Any) -> Any:
        def copied(*inputs: Any) -> Any:
            outputs = function(*inputs)
            return tuple(map(_copy, outputs)) if isinstance(outputs, tuple) else _copy(outputs)

        return forward(ctx, copied, *rest)

    CheckpointFunction.forward = staticmethod(forward_with_copies)


def _copy(output: Any) -> Any:
    return output.clone() if isinstance(output, torch.nn.Parameter) else output
