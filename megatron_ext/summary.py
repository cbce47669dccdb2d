"""What a run is about to do, in a few lines behind Megatron's list of eight hundred arguments."""

from __future__ import annotations

from argparse import Namespace

from megatron_ext.checkpoint.source import ReferenceSource, Start
from megatron_ext.config import UnlearnConfig
from megatron_ext.rates import describe_rate


def describe(
    args: Namespace, config: UnlearnConfig, start: Start, source: ReferenceSource | None
) -> str:
    """Where the run starts, what it minimises, how long, at which rate if it goes on, and where it saves.

    Args:
        args: Megatron's validated arguments.
        config: the settings of unlearning.
        start: the checkpoint that it begins with.
        source: the reference's checkpoint, if there is one.

    Returns:
        A line each, without an end.
    """
    lines = {
        "starts": _start(start),
        "objective": _objective(args, config, source),
        "steps": _steps(args, start),
    }
    if (rate := describe_rate(args, start)) is not None:
        lines["lr"] = rate
    lines["saves"] = _saves(args)
    return "\n".join(f"{name + ':':<11}{text}" for name, text in lines.items())


def _start(start: Start) -> str:
    if start.checkpoint is None:
        return "from random weights"
    what = "" if start.resumed else "the weights of "
    found = start.checkpoint
    return f"from {what}iteration {found.iteration:,} of {found.directory} ({start.flag})"


def _objective(args: Namespace, config: UnlearnConfig, source: ReferenceSource | None) -> str:
    what = "documents" if args.chat_digest is None else "conversations"
    within = f"; attention within {what}" if args.dataloader_inter_document_masking else ""
    if not config.enabled:
        of = "" if args.chat_digest is None else " on the assistant's tokens"
        return f"cross-entropy{of}{within}"
    batch = args.global_batch_size
    forgotten = config.forget_samples(batch, train_global_batch_size=batch)
    terms = [
        f"{config.forget_weight:g} x {config.forget_loss} forgetting",
        f"{config.replay_weight:g} x cross-entropy",
    ]
    if source is not None:
        reference = f"{source.checkpoint.directory}, iteration {source.checkpoint.iteration:,}"
        terms.append(f"{config.mitigation_weight:g} x KL to {reference}")
    return f"{' + '.join(terms)}; {forgotten} of {batch} samples a step are forgotten{within}"


def _steps(args: Namespace, start: Start) -> str:
    if args.skip_train:
        return "none (--skip-train)"
    batch, length = args.global_batch_size, args.seq_length
    if args.train_iters is None:
        return f"as many as {args.train_samples:,} samples of {length:,} tokens need"
    done = 0 if start.before is None else start.before.iteration
    left = max(0, args.train_iters - done)
    count = f"{left:,} left of {args.train_iters:,}" if done else f"{left:,}"
    if args.step_batch_size_schedule:
        return f"{count}, each of up to {batch:,} samples of {length:,} tokens"
    return (
        f"{count}, each of {batch:,} samples of {length:,} tokens: {left * batch * length:,} tokens"
    )


def _saves(args: Namespace) -> str:
    if args.skip_train or not args.save:
        return "nothing" if args.skip_train else "nothing (no --save)"
    often = f"every {args.save_interval:,} steps and " if args.save_interval else ""
    return f"{often}at the end, to {args.save}"
