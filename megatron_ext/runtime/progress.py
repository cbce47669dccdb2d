"""How fast a run is, and when it will be over: in Megatron's line of a step, and in progress.txt."""

from __future__ import annotations

import logging
import re
from argparse import Namespace
from collections import deque
from functools import partial
from typing import Any

import torch

from megatron_ext.gpus import of_device

logger = logging.getLogger(__name__)

_STEP = re.compile(
    r" iteration +(?P<done>\d+)/ *(?P<all>\d+) \|.* elapsed time per iteration \(ms\): (?P<ms>[\d.]+) \|"
    r".* global batch size: +(?P<batch>\d+) \|"
)
_RATE = re.compile(r" throughput per GPU \(TFLOP/s/GPU\): (?P<rate>[\d.]+) \|")
# The first two lines of a start count its first step, which compiles and fills caches.
_STARTING = 2
_LINES = 20  # whose mean tells what is left


class Progress:
    """Adds to the line of a step what an operator would work out from it.

    Args:
        args: Megatron's validated arguments.
        peak: FLOP/s of a GPU, or ``None`` where it is not known.
    """

    def __init__(self, args: Namespace, *, peak: float | None) -> None:
        self.args = args
        self.peak = peak
        self._lines = 0
        self._seconds: deque[float] = deque(maxlen=_LINES)

    def complete(self, line: str) -> str:
        """The line with tokens a second, utilisation and the time that is left, as far as they are known.

        Args:
            line: what Megatron's last rank prints; all but the line of a step is given back as it is.
        """
        step = _STEP.search(line)
        if step is None or float(step["ms"]) <= 0:
            return line
        seconds = float(step["ms"]) / 1e3
        rate = int(step["batch"]) * self.args.seq_length / seconds
        parts = [f" tokens/s: {rate:.0f} |"]
        if self.args.world_size > 1:
            parts.append(f" tokens/s/GPU: {rate / self.args.world_size:.0f} |")
        flops = _RATE.search(line)
        if flops is not None and self.peak is not None:
            parts.append(f" MFU: {float(flops['rate']) * 1e12 / self.peak:.1%} |")
        self._lines += 1
        if self._lines > _STARTING:
            self._seconds.append(seconds)
            self._log(rate, int(step["done"]))
            # Later steps of such a schedule are longer.
            if self.args.step_batch_size_schedule is None:
                mean = sum(self._seconds) / len(self._seconds)
                left = (int(step["all"]) - int(step["done"])) * mean
                parts.append(f" left: {duration(left)} |")
        return line + "".join(parts)

    def _log(self, rate: float, iteration: int) -> None:
        from megatron.training import get_tensorboard_writer

        writer = get_tensorboard_writer()
        if writer is not None and self.args.log_timers_to_tensorboard:
            writer.add_scalar("tokens-per-second", rate, iteration)


def duration(seconds: float) -> str:
    """Days and hours, or hours, with minutes: ``2 d 3:04``, ``3:04``."""
    minutes = round(seconds / 60)
    days, hours = divmod(minutes // 60, 24)
    return f"{f'{days} d ' if days else ''}{hours}:{minutes % 60:02}"


def show() -> None:
    """Have Megatron's loop print the line of a step with what is added."""
    import megatron.training.training as loop

    print_rank_last = loop.print_rank_last
    progress: list[Progress] = []

    def print_line(message: str) -> None:
        if _STEP.search(message):
            if not progress:
                args = loop.get_args()
                half = args.bf16 or args.fp16  # what peaks are stated of
                gpu = of_device(torch.cuda.get_device_name()) if half else None
                progress.append(Progress(args, peak=None if gpu is None else gpu.flops))
            message = progress[0].complete(message)
        print_rank_last(message)

    loop.print_rank_last = print_line


def write_on_one_rank() -> None:
    """Have ``--log-progress`` read progress.txt on rank 0 alone, and do without where it cannot.

    Megatron reads it on all ranks after each save. A line that was cut short, by a full disk or a killed run,
    would end this and every later start there.
    """
    import megatron.training.training as loop

    append = loop.compute_throughputs_and_append_to_progress_log

    def append_on_one_rank(iteration: int, operations: Any) -> None:
        if torch.distributed.get_rank() != 0:
            return
        try:
            append(iteration, operations)
        except (AssertionError, IndexError, ValueError, OSError) as error:
            logger.warning(
                "--log-progress: %s/progress.txt cannot be read (%s: %s), so nothing is added to it",
                *(loop.get_args().save, type(error).__name__, error),
            )

    # Its barrier would wait for the ranks that do not call it.
    loop.append_to_progress_log = partial(loop.append_to_progress_log, barrier=False)
    loop.compute_throughputs_and_append_to_progress_log = append_on_one_rank


def apply() -> None:
    """Put both into Megatron's loop."""
    show()
    write_on_one_rank()
