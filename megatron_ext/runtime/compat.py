"""What megatron-core 0.19.2's training loop needs on every machine, each with its reason."""

from __future__ import annotations

import importlib.util
import logging
import os
from argparse import ArgumentParser
from importlib.metadata import version
from typing import Any

from megatron_ext.exceptions import ConfigError
from megatron_ext.runtime import resume, safe_load

logger = logging.getLogger(__name__)

# The seams used here (the schedule getter of the loop, output_processor, post_wrap_hooks) were read in
# this version; another one may have moved them, and a moved seam would silently train something else.
MEGATRON_VERSION = "0.19.2"


def check_megatron_version() -> None:
    """Refuse to run on a megatron-core whose seams were not checked.

    Raises:
        ConfigError: another version than :data:`MEGATRON_VERSION` is installed.
    """
    found = version("megatron-core")
    if found != MEGATRON_VERSION:
        raise ConfigError(
            f"megatron-core: expected version {MEGATRON_VERSION} (requirements.txt), found {found}"
        )


def skip_helper_compilation() -> None:
    """Do not run ``make`` for the dataset helpers where the wheel already brings them compiled.

    The wheel carries ``helpers_cpp`` as a compiled module but not the Makefile that Megatron's
    ``compile_helpers()`` calls, so ``pretrain()`` would exit on every machine.
    """
    if importlib.util.find_spec("megatron.core.datasets.helpers_cpp") is None:
        return
    import megatron.core.datasets.utils as dataset_utils

    dataset_utils.compile_helpers = lambda: None


def repair_help(parser: ArgumentParser) -> None:
    """Escape the per cent signs of help texts that argparse would take for a format.

    One of Megatron's has a bare one, and ``--help`` then ends in a traceback.
    """
    for action in parser._actions:
        try:
            action.help and action.help % {**vars(action), "prog": parser.prog}
        except (ValueError, TypeError):
            action.help = str(action.help).replace("%", "%%")


def be_the_only_process() -> None:
    """Fill in what a launcher would set, so that one process runs without ``torchrun``.

    Megatron takes a missing rank for rank 0 of 1 but has no address to meet at. Port 0 lets the system
    choose a free one.
    """
    if "RANK" in os.environ:
        return
    single = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    os.environ |= single | {"MASTER_ADDR": "localhost", "MASTER_PORT": "0"}


def print_negative_losses() -> None:
    """Print the averages that Megatron's console leaves out because they are below zero.

    With gradient ascent the forgetting loss, and in the end the whole objective, is negative;
    ``training_log`` prints no such average. They follow on a line of their own.
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
        if iteration % loop.get_args().log_interval == 0 or is_first_iteration:
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
        return result

    loop.training_log = log_all


def skip_on_every_layout() -> None:
    """Let ``--iterations-to-skip`` read on in the data, and do nothing else.

    Megatron shares the skipped samples out as in a step that is run. It takes the list of iterators of an
    interleaved pipeline for one iterator, asks for samples where a middle stage reads none, and slices all
    that a sample holds for context parallelism, its ``source`` included: each ends the run.
    """
    import megatron.training.training as loop
    from megatron.core.rerun_state_machine import get_rerun_state_machine

    def read_on(data_iterator: Any) -> None:
        iterators = data_iterator if isinstance(data_iterator, list) else [data_iterator]
        while get_rerun_state_machine().should_run_forward_backward(data_iterator):
            for iterator in iterators:
                if iterator is None:  # this rank, or this stage of it, reads no data
                    continue
                for _ in range(loop.get_num_microbatches()):
                    next(iterator)

    loop.dummy_train_step = read_on


def apply() -> None:
    """Apply all of the above that is no matter of flags; called once by the entry point before training."""
    check_megatron_version()
    safe_load.enable()
    skip_helper_compilation()
    be_the_only_process()
    print_negative_losses()
    skip_on_every_layout()
    resume.apply()
