"""Ends a run when the model has moved as far as the user wants it to: reaching a limit is success.

Each limit bounds a metric of a single training step, of which Megatron's loop is told where it decides
whether to leave. ``replay increase`` is the replay loss minus the reference's on the very same tokens, so it
is 0 for an unchanged model and does not move with the data; nothing has to be averaged.
"""

from __future__ import annotations

import logging
import math
from argparse import Namespace
from dataclasses import dataclass
from typing import Any

import torch

from megatron_ext.checkpoint.source import Start
from megatron_ext.config import UnlearnConfig
from megatron_ext.exceptions import flag_name
from megatron_ext.objective import INCREASE, PROBABILITY, TERMS

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Limit:
    """A bound of a metric.

    Attributes:
        flag: the flag that sets it.
        metric: the metric's name, as it is logged.
        value: the bound.
        forgotten: whether it is a mean over forgotten tokens, and falls; one over replayed tokens rises.
    """

    flag: str
    metric: str
    value: float
    forgotten: bool

    def is_reached(self, found: float) -> bool:
        """Whether the metric, NaN for a step without its tokens, is at the bound or beyond."""
        return found <= self.value if self.forgotten else found >= self.value

    def share(self, found: float) -> float:
        """How far the metric is on its way: 1 at the bound, more beyond it."""
        return self.value / max(found, 1e-30) if self.forgotten else found / self.value


def limits(config: UnlearnConfig | Namespace) -> list[Limit]:
    """The bounds that a run was given, by its settings or by the arguments that its checkpoint recorded."""
    every = (
        ("max_mitigation_kl", TERMS[2], False),
        ("min_forget_probability", PROBABILITY, True),
        ("max_replay_increase", INCREASE, False),
    )
    return [
        Limit(flag_name(name), metric, value, forgotten)
        for name, metric, forgotten in every
        if (value := getattr(config, name, None)) is not None
    ]


def reached_before(config: UnlearnConfig, start: Start) -> str | None:
    """Why there is nothing left to train: a limit that the resumed checkpoint's last step had reached.

    Args:
        config: the limits of this run, which may be others than those of the run before.
        start: where the run begins.
    """
    if start.before is None:
        return None
    found = start.recorded("unlearn_watch") or {}
    for limit in limits(config):
        if limit.is_reached(found.get(limit.metric, math.nan)):
            return (
                f"nothing left to train: {limit.metric} had reached {found[limit.metric]:.6g} at iteration "
                f"{start.before.iteration} of {start.before.directory}, {limit.flag} is "
                f"{limit.value:.6g}; to continue, change the limit or leave it out"
            )
    return None


def warn_of_unfinished(args: Namespace, start: Start) -> None:
    """Say that the checkpoint that a new run starts from is from the middle of its own run.

    Most often that run is still going on, or was stopped, as when two jobs were submitted together. One that
    a limit has ended is not meant.

    Args:
        args: Megatron's validated arguments.
        start: where the run begins.
    """
    found = start.checkpoint
    if found is None or start.resumed or args.rank != 0 or args.ckpt_step:
        return
    planned = getattr(found.args, "train_iters", None)
    watched = getattr(found.args, "unlearn_watch", None) or {}
    ended = any(
        limit.is_reached(watched.get(limit.metric, math.nan)) for limit in limits(found.args)
    )
    if planned is not None and 0 < found.iteration < planned and not ended:
        logger.warning(
            "%s %s: its latest checkpoint is of iteration %d of the %d of its run, so this run starts from a "
            "model that is not trained to its end",
            *(start.flag, found.directory, found.iteration, planned),
        )


class Watch:
    """Compares each step's metrics with the limits, on all ranks alike.

    Args:
        args: Megatron's validated arguments; ``unlearn_watch`` in them, and so in every checkpoint, keeps
            the watched metrics of the last step.
        config: the limits.
    """

    def __init__(self, args: Namespace, config: UnlearnConfig) -> None:
        self.args = args
        self.limits = limits(config)
        self._observed: torch.Tensor | None = None

    def observe(self, metrics: dict[str, torch.Tensor], tokens: torch.Tensor) -> None:
        """Take over a training step's metrics; called on the last stage.

        Args:
            metrics: scalars of the global batch, by name.
            tokens: fp64 ``[2]``, its forgotten and replayed tokens; a mean over none says nothing.
        """
        if self.limits:
            values = [
                torch.where(
                    tokens[0 if limit.forgotten else 1] > 0, metrics[limit.metric], math.nan
                )
                for limit in self.limits
            ]
            self._observed = torch.stack(values).double()

    def install(self) -> None:
        """Join Megatron's decision whether to leave the loop, after each step."""
        if not self.limits:
            return
        import megatron.training.training as loop

        decide = loop.checkpoint_and_decide_exit

        def decide_with_limits(
            model: Any,
            optimizer: Any,
            opt_param_scheduler: Any,
            iteration: int,
            operations: Any,
            checkpointing_context: Any,
            train_data_iterator: Any,
        ) -> bool:
            # Before Megatron may save: the checkpoint shall hold this step's metrics.
            reached = self._reached(iteration)
            state = (model, optimizer, opt_param_scheduler)
            leaves: bool = decide(
                *state, iteration, operations, checkpointing_context, train_data_iterator
            )
            if not reached:
                return leaves
            args = self.args
            saved = leaves or (args.save_interval and iteration % args.save_interval == 0)
            if args.save and not saved:
                loop.save_checkpoint_and_time(
                    iteration,
                    *state,
                    operations,
                    checkpointing_context,
                    train_data_iterator=train_data_iterator,
                )
            for line in reached:
                loop.print_rank_0(line)
            return True

        loop.checkpoint_and_decide_exit = decide_with_limits

    def _reached(self, iteration: int) -> list[str]:
        """Share the last stage's metrics with all ranks; a line for each limit that they reached."""
        shared = self._observed
        if shared is None:
            device = torch.cuda.current_device()
            shared = torch.zeros(len(self.limits), dtype=torch.float64, device=device)
        last = torch.distributed.get_world_size() - 1  # always of the last stage
        torch.distributed.broadcast(shared, src=last)
        found = dict(zip((limit.metric for limit in self.limits), shared.tolist(), strict=True))
        self.args.unlearn_watch = found
        self._log(found, iteration)
        return [
            f"stopping after iteration {iteration}: {limit.metric} is {found[limit.metric]:.6g} and has "
            f"reached {limit.flag} {limit.value:.6g}"
            for limit in self.limits
            if limit.is_reached(found[limit.metric])
        ]

    def _log(self, found: dict[str, float], iteration: int) -> None:
        from megatron.training import get_tensorboard_writer

        writer = get_tensorboard_writer()
        if writer is None or iteration % self.args.tensorboard_log_interval:
            return
        for limit in self.limits:
            share = limit.share(found[limit.metric])
            writer.add_scalar(f"watch/{limit.metric}", share, iteration)
