"""What reaches the terminal: nothing that the user can do nothing about, and no number without a meaning."""

from __future__ import annotations

import contextlib
import difflib
import io
import logging
import re
import sys
import warnings
from argparse import ArgumentParser
from collections.abc import Collection, Mapping
from typing import Any, NoReturn

# Beginnings of warnings that Megatron-Core and torch, both pinned, cause between themselves, on every rank.
_WARNINGS = (
    ".*(Transformer Engine|Apex|transformer-engine)",  # the entry point says which layers are used
    "torch.distributed is disabled",  # a checkpoint's arguments are read before there are process groups
    "The argument order of load has been changed",
    "Please use DTensor instead and we are deprecating ShardedTensor",
    ".*(all_gather_into_tensor|reduce_scatter_tensor). is deprecated",
    "The .grad attribute of a Tensor that is not a leaf",  # asked for by the distributed optimizer
    ".* is experimental and still under active development",  # imported by Megatron, used by nobody
    "'pin_memory' argument is set as true but no accelerator is found",
    "enabling --no-load-optim when skipping training",
    "If you are using transformer_engine as the transformer implementation, the core_attn",
    "`sequence_parallel` is set to `True`, but tensor model parallel size is 1",  # that of the experts
    # Set by examples/slurm/node.sh, and printed behind it.
    "Flight recorder: environment variable TORCH_FR_DUMP_TEMP_FILE is already set",
    "Setting args.check_for_nan_in_loss_and_grad to False since dynamic loss scaling",  # see finite.py
)
_LOGS: dict[str, tuple[str, ...]] = {
    # A run says by itself that there is no device.
    "torch.utils.cpp_extension": ("No CUDA runtime is found",),
    "megatron.core.models.gpt.gpt_model": ("GPTModel IS DEPRECATED",),
    "megatron.core.dist_checkpointing.strategies.torch": ("MCore's async save is deprecated",),
    "megatron.core.rerun_state_machine": (
        "RerunStateMachine initialized",
        "Setting RerunStateMachine",
    ),
    # The flag itself, and what is the same as in the checkpoint or said at the start.
    "megatron.core.optimizer_param_scheduler": (
        "> learning rate decay style",
        " > using checkpoint value",
    ),
}
# Their news has the level INFO, of others not shown: times of a save, a load, a validation or of parts of a
# step (--timing-log-level); what the learning rate's schedule takes over; ranks that are slow.
_NEWS = (
    "megatron.core.timers",
    "megatron.core.optimizer_param_scheduler",
    "megatron.core.utils",
)
_PERPLEXITY = re.compile(r"\| ([^|]+) PPL: \S+ (?=\|)")


def quiet() -> None:
    """Leave out what a library says of itself; call it before anything of ``megatron`` is imported."""
    for message in _WARNINGS:
        warnings.filterwarnings("ignore", message=message)
    leave_out(_LOGS)


def write_whole_lines() -> None:
    """Write a line that is printed by itself in one piece, which those of other ranks cannot come into.

    With ``PYTHONUNBUFFERED``, which containers are often built with, ``print`` writes the end of a line by
    itself, and lines of ranks that share an output run together.
    """
    for stream in (sys.stdout, sys.stderr):
        # A test or a notebook may have put something else there.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(write_through=False, line_buffering=True)


def show_times() -> None:
    """Show what Megatron's loop logs for whoever watches a run; tools, whose output is a result, do not."""
    for name in _NEWS:
        logging.getLogger(name).setLevel(logging.INFO)


def leave_out(beginnings: Mapping[str, tuple[str, ...]]) -> None:
    """Leave out log lines, by their logger and how they begin."""

    def is_news(record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith(beginnings[record.name])

    for name in beginnings:
        logging.getLogger(name).addFilter(is_news)


def hidden() -> contextlib.AbstractContextManager[object]:
    """Hides what Megatron prints where no run is started: its 600 arguments, and each step of its start."""
    return contextlib.redirect_stdout(io.StringIO())


def suggest_flags(parser: ArgumentParser) -> None:
    """Let a parser answer a mistyped flag with the closest that it knows.

    Args:
        parser: Megatron's, with the product's flags in it or still to come.
    """
    refuse_words = parser.error

    def error(message: str) -> NoReturn:
        refuse_words(with_suggestion(message, parser._option_string_actions))

    parser.error = error  # type: ignore[method-assign]


def with_suggestion(message: str, flags: Collection[str]) -> str:
    """A parser's message, with the closest of its flags if words were none of them."""
    if message.startswith("unrecognized arguments"):
        names = (word.partition("=")[0] for word in message.split() if word.startswith("--"))
        like = [difflib.get_close_matches(name, flags, n=1) for name in names]
        if found := ", ".join(match for matches in like for match in matches):
            message = f"{message}; did you mean {found}?"
    return message


def repair_training_log() -> None:
    """Print the averages that Megatron leaves out because they are below zero, and memory only twice.

    With gradient ascent the forgetting loss, and in the end the whole objective, is negative;
    ``training_log`` prints no such average. They follow on a line of their own.

    Megatron reports memory until two steps after the iteration that was loaded, and takes that of
    ``--pretrained-checkpoint`` for it: a run from iteration 70,000 printed eleven lines more at each of its
    first 70,000 steps.
    """
    import megatron.training.training as loop

    training_log = loop.training_log

    def log_all(
        loss_dict: dict[str, Any],
        total_loss_dict: dict[str, Any],
        learning_rate: float | None,
        iteration: int,
        loss_scale: float,
        report_memory_flag: bool,
        skipped_iter: int,
        *args: Any,
        is_first_iteration: bool = False,
        **kwargs: Any,
    ) -> bool:
        averages: dict[str, float] = {}
        is_printed = iteration % loop.get_args().log_interval == 0 or is_first_iteration
        if is_printed:
            # Megatron clears the totals once they are printed, so the averages are taken before.
            new = {} if skipped_iter else loss_dict
            steps = total_loss_dict.get("advanced iterations", 0) + (0 if skipped_iter else 1)
            averages = {
                key: float(total_loss_dict.get(key, 0.0) + new.get(key, 0.0)) / max(1, steps)
                for key in loss_dict
            }
        result: bool = training_log(
            loss_dict,
            total_loss_dict,
            learning_rate,
            iteration,
            loss_scale,
            report_memory_flag,
            skipped_iter,
            *args,
            is_first_iteration=is_first_iteration,
            **kwargs,
        )
        texts = [f" {key}: {value:.6E} |" for key, value in averages.items() if value < 0]
        if texts:
            loop.print_rank_last(f" iteration {iteration:8d} |{''.join(texts)}")
        return result and (is_first_iteration or not is_printed)

    loop.training_log = log_all


def repair_validation_log() -> None:
    """Leave "PPL", the exponential, out of Megatron's line of validation for all but a mean cross-entropy.

    It prints one for every value: of probabilities, of the KL, of the perplexity itself.
    """
    import megatron.training.training as loop

    print_rank_last = loop.print_rank_last

    def print_line(message: str) -> None:
        if message.startswith(" validation"):
            message = _PERPLEXITY.sub(
                lambda found: found[0] if found[1] == "lm loss" else "", message
            )
        print_rank_last(message)

    loop.print_rank_last = print_line


def apply() -> None:
    """Repair what Megatron's loop prints."""
    repair_training_log()
    repair_validation_log()
