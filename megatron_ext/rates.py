"""The learning rate of a run that goes on: before, from here on and at its end, by Megatron's own schedule.

Megatron counts the schedule in samples. Where a run goes on with other flags for it, or with another batch,
its rate may jump, and the run may end before its schedule does or after.
"""

from __future__ import annotations

import logging
from argparse import Namespace
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_ext.checkpoint.inspect import Checkpoint
from megatron_ext.checkpoint.resumable import schedule_of
from megatron_ext.checkpoint.source import Start

logger = logging.getLogger(__name__)

# These have no end that a run could miss.
_ENDLESS = ("constant", "inverse-square-root")
# Of the schedule's length; skipped iterations take some samples from it.
_TOLERANCE = 0.01


@dataclass(frozen=True)
class Rates:
    """What the schedule gives.

    Attributes:
        before: the rate of the checkpoint's last step by the schedule that it was trained with; ``None`` if
            it holds no schedule.
        now: the rate of the first step from here.
        last: the rate at the end of the run; ``None`` if its length in samples is not known.
        end: samples of the schedule that are behind the run at its end; ``None`` as well.
        length: samples that the schedule has.
    """

    before: float | None
    now: float
    last: float | None
    end: int | None
    length: float


def find_rates(args: Namespace, checkpoint: Checkpoint) -> Rates:
    """Evaluate Megatron's schedule where a run goes on and where it ends.

    Args:
        args: Megatron's validated arguments of this run.
        checkpoint: what it goes on from.
    """
    saved, before = checkpoint.schedule, None
    done = 0 if saved is None or args.no_load_optim else int(saved["num_steps"])
    if saved is not None:
        before = rate_of(saved, checkpoint.args, samples=int(saved["num_steps"]))
    kept = args.use_checkpoint_opt_param_scheduler and saved is not None and not args.no_load_optim
    schedule = saved if kept and saved is not None else schedule_of(args)
    end = None
    if args.step_batch_size_schedule is None:
        iterations = args.train_iters or args.train_samples // args.global_batch_size
        end = done + max(0, iterations - checkpoint.iteration) * args.global_batch_size
    return Rates(
        before=before,
        now=rate_of(schedule, args, samples=done),
        last=None if end is None else rate_of(schedule, args, samples=end),
        end=end,
        length=schedule["lr_decay_steps"],
    )


def rate_of(schedule: dict[str, Any], args: Namespace, *, samples: int) -> float:
    """Megatron's learning rate behind some samples.

    Args:
        schedule: the state of the scheduler, or what would be.
        args: Megatron's arguments, which have what that state does not hold.
        samples: how far the schedule has come.
    """
    names = ("lr_wsd_decay_iters", "lr_wsd_decay_samples", "lr_wsd_decay_style")
    iterations, decay, style = (getattr(args, name, None) for name in names)  # of an older Megatron
    if iterations is not None:
        decay = iterations * args.global_batch_size
    flags = {"init_lr": getattr(args, "lr_warmup_init", 0.0), "lr_wsd_decay_style": style}
    state = {**schedule, **flags, "num_steps": samples, "wsd_decay_steps": decay}
    scheduler: Any = SimpleNamespace(**state)
    return float(OptimizerParamScheduler.get_lr(scheduler, {}))


def describe_rate(args: Namespace, start: Start) -> str | None:
    """The rates of a run that goes on, in words; ``None`` where there is none to tell."""
    if start.before is None or args.skip_train:
        return None
    found = find_rates(args, start.before)
    parts = [f"{found.now:.1e} from here"]
    if found.before is not None:
        parts.insert(0, f"{found.before:.1e} at iteration {start.before.iteration:,}")
    if found.last is not None:
        parts.append(f"{found.last:.1e} at the end")
    return ", ".join(parts)


def warn_of_end(args: Namespace, start: Start) -> None:
    """Say that a run will end before or after its schedule, unless its flags say so themselves.

    Args:
        args: Megatron's validated arguments.
        start: where the run begins.
    """
    if start.before is None or args.skip_train or args.rank != 0:
        return
    checkpoint, batch = start.before, args.global_batch_size
    found = find_rates(args, checkpoint)
    kept = args.use_checkpoint_opt_param_scheduler and not args.no_load_optim
    source = checkpoint.args if kept else args
    unit = "iters" if source.train_iters else "samples"
    length, decay = getattr(source, f"train_{unit}"), getattr(source, f"lr_decay_{unit}")
    if found.end is None or decay not in (None, length) or source.lr_decay_style in _ENDLESS:
        return
    missed = found.length - found.end
    done = checkpoint.iteration >= (args.train_iters or args.train_samples // batch)
    if done or source.lr == source.min_lr or abs(missed) <= max(batch, _TOLERANCE * found.length):
        return
    unit = "iters" if args.train_iters else "samples"
    if kept:
        more = round(missed / batch)
        total = args.train_iters or args.train_samples // batch
        value = (total + more) * (1 if args.train_iters else batch)
        remedy = f"--train-{unit} {value}"
    else:
        remedy = f"--lr-decay-{unit} {found.end // batch if args.train_iters else found.end}"
        if not args.override_opt_param_scheduler and not args.no_load_optim:
            remedy += " --override-opt-param-scheduler"
    logger.warning(
        "--train-%s: the run ends at sample %d of the learning rate schedule, which has %d samples; %s would "
        "let both end together",
        *(unit, found.end, found.length, remedy),
    )
