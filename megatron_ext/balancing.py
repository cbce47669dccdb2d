"""The balancing losses of a mixture of experts, where only some of the tokens are in the loss.

Without ``--calculate-per-token-loss`` a router's balancing loss and z-loss, each a mean over the tokens of a
microbatch, are averaged over microbatches and data-parallel ranks. With it all gradients are divided by the
number of tokens that count, and Megatron multiplies these losses by all tokens beforehand: in chat tuning,
where the assistant's tokens alone count, they would weigh as much more as there are other tokens. So they are
scaled by the share of tokens that count in the global batch, through Megatron's ``moe_grad_scale_func``; what
is logged of them does not depend on it.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.transformer.module import MegatronModule
from megatron.core.utils import get_model_config

from megatron_ext.runtime import loaders

Samples = Iterator[dict[str, Any]] | None


def is_needed(args: Namespace) -> bool:
    """Whether experts are balanced by a loss, and gradients divided by the tokens that count.

    Args:
        args: Megatron's validated arguments.
    """
    if not args.num_experts or not args.calculate_per_token_loss:
        return False
    given = args.moe_aux_loss_coeff
    return any([*(given if isinstance(given, list) else [given]), args.moe_z_loss_coeff])


def install() -> None:
    """Go around Megatron's schedule, as it is by now."""
    import megatron.training.training as loop

    get_schedule = loop.get_forward_backward_func

    def get_scaling_schedule(*args: Any, **kwargs: Any) -> Callable[..., Any]:
        return partial(scale_balancing, get_schedule(*args, **kwargs))

    loop.get_forward_backward_func = get_scaling_schedule
    loaders.fetch_whole_steps()


def scale_balancing(
    schedule: Callable[..., Any],
    *,
    data_iterator: Samples | list[Samples],
    model: list[MegatronModule],
    num_microbatches: int,
    forward_only: bool = False,
    **arguments: Any,
) -> Any:
    """Run a step whose balancing losses have their coefficients; the signature is that of the schedules.

    All microbatches are read first, because the scale is that of the whole step; stages of a pipeline that
    read none have it as well.

    Returns:
        What the schedule does.
    """
    if not forward_only:
        several = isinstance(data_iterator, list)
        iterators: Any = data_iterator if several else [data_iterator]
        ahead = [
            None if samples is None else [next(samples) for _ in range(num_microbatches)]
            for samples in iterators
        ]
        share = _share_in_loss(ahead[-1])
        config = get_model_config(model[0])
        config.moe_grad_scale_func = lambda: _loss_scale(config.grad_scale_func) * share
        kept = [None if read is None else iter(read) for read in ahead]
        data_iterator = kept if several else kept[0]
    return schedule(
        data_iterator=data_iterator,
        model=model,
        num_microbatches=num_microbatches,
        forward_only=forward_only,
        **arguments,
    )


def _share_in_loss(samples: list[dict[str, Any]] | None) -> torch.Tensor:
    """Part of the global batch's tokens that count, fp32 scalar, the same on all ranks.

    Args:
        samples: of the last model chunk of this rank. One rank of each copy of the model counts its own.
    """
    counts = torch.zeros(2, dtype=torch.float64, device=torch.cuda.current_device())
    last = parallel_state.is_pipeline_last_stage(ignore_virtual=True)
    if samples is not None and last and parallel_state.get_context_parallel_rank() == 0:
        for sample in samples:
            mask = sample["loss_mask"]
            counts += torch.stack((mask.sum(), mask.new_tensor(mask.numel()))).to(counts)
    torch.distributed.all_reduce(counts)
    return (counts[0] / counts[1]).float()


def _loss_scale(grad_scale: Callable[[torch.Tensor], torch.Tensor] | None) -> torch.Tensor:
    """What the loss is multiplied by in fp16, else 1; `[1]`."""
    one = torch.ones(1, device=torch.cuda.current_device())
    return one if grad_scale is None else grad_scale(one)
