#!/usr/bin/env python
"""Build the index of the data that a run will look for in --data-cache-path, before the run.

    python tools/build_index.py -- --num-layers 32 ... --data-cache-path cache --data-path ...

After -- come the run's own flags, as pretrain_unlearn.py gets them. One process, no GPU and no model; all
splits, the text to forget and the text to replay. A run whose data, split, sequence length, seed, batch
sizes, iterations or tokenizer differ has another index. What is there already is not built again.
"""

from __future__ import annotations

import argparse
import io
import logging
import math
import os
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_ext.exceptions import ConfigError
from tools.common import BEHIND, ToolParser, run_tool

# By these flags the ranks of a run are split; the least number of them can be told from the rest.
_LAYOUT = ("tensor-model", "pipeline-model", "context", "expert-model")


class _Progress(logging.Handler):
    """Counts the indices that were built and found."""

    def __init__(self, bar: tqdm) -> None:
        super().__init__(logging.INFO)
        self.bar = bar
        self.built = self.found = 0

    def emit(self, record: logging.LogRecord) -> None:
        """Take one of the lines of ``index_cache``."""
        if record.levelno != logging.INFO:
            return
        self.built += record.getMessage().endswith("built")
        self.found += record.getMessage().endswith("found")
        self.bar.update()


def run_flags(argv: Sequence[str]) -> list[str]:
    """The flags of the run among this tool's own words.

    Raises:
        ConfigError: there are none, or the index would depend on what they do not say.
    """
    parser = ToolParser(description=__doc__, usage="%(prog)s [-h] -- FLAGS", hint=BEHIND)
    parser.add_argument(
        "flags", nargs="+", metavar="FLAGS", help="flags of pretrain_unlearn.py, after --"
    )
    flags: list[str] = parser.parse_args(argv).flags
    names = {word.partition("=")[0] for word in flags}
    if "--data-cache-path" not in names:
        raise ConfigError(
            "--data-cache-path: expected the folder where the run will look, found none; without one "
            "Megatron keeps no index of a blend"
        )
    if "--global-batch-size" not in names:
        raise ConfigError(
            "--global-batch-size: expected a size, found none; it would depend on the number of ranks"
        )
    for name in ("--chat-data-path", "--mock-data", "--phase-transition-iterations"):
        if name in names:
            raise ConfigError(
                f"{name}: such a run has no index of its data that could be built before it"
            )
    return flags


def smallest_world(flags: Sequence[str]) -> int:
    """Ranks of one copy of the model: experts are spread over those that otherwise hold copies."""
    parser = argparse.ArgumentParser(allow_abbrev=False, add_help=False)
    for name in _LAYOUT:
        parser.add_argument(f"--{name}-parallel-size", dest=name, type=int, default=1)
    parser.add_argument("--expert-tensor-parallel-size", type=int)
    given = vars(parser.parse_known_args(flags)[0])
    tp, pp, cp, ep = (given[name] for name in _LAYOUT)
    return pp * math.lcm(tp * cp, ep * (given["expert_tensor_parallel_size"] or tp))


def parse(flags: Sequence[str]) -> tuple[Namespace, Callable[[], object]]:
    """Parse and check as the run does; its arguments, and what builds its datasets."""
    from megatron_ext.runtime import collector

    with collector.paused():
        from megatron_ext.runtime import compat, cpu

        cpu.enable()
        from megatron.training import training as loop

        from megatron_ext import arguments
        from megatron_ext.data.checks import check_datasets
        from megatron_ext.data.overlap import check_overlap
        from megatron_ext.data.providers import build_datasets

    compat.apply()
    os.environ["WORLD_SIZE"] = str(smallest_world(flags))
    # Nothing is logged to where the run will log; of a flag that is given twice the last one counts.
    words = [*flags, "--tensorboard-dir", "", "--wandb-project", ""]
    told = io.StringIO()  # 800 lines: all of Megatron's arguments
    try:
        with compat.command_line(words), redirect_stdout(told):
            args, config, _ = arguments.parse()
    except ConfigError as error:
        if isinstance(error.__cause__, SystemExit):
            # Megatron has printed its reason, and nothing else yet.
            print(told.getvalue(), end="")
        raise
    check_datasets(args, config)
    check_overlap(args, config)
    args.dataloader_fast_cache_load = args.dataloader_defer_npy_index_mmap = False
    args.iteration = 0
    if not args.skip_train:
        loop.update_train_iters(args)
    samples = list(loop.get_train_valid_test_num_samples())
    return args, partial(build_datasets, args, config, samples)


def main() -> None:
    """Build, and print what there is now."""
    flags = run_flags(sys.argv[1:])
    start = time.perf_counter()
    with redirect_stdout(sys.stderr):
        args, build = parse(flags)
        log = logging.getLogger("megatron_ext.data.index_cache")
        with tqdm(unit=" indices", disable=None) as bar:
            progress = _Progress(bar)
            log.addHandler(progress)
            log.propagate = False
            build()
    cache = Path(args.data_cache_path)
    size = sum(file.stat().st_size for file in cache.iterdir() if file.is_file())
    print(
        f"{progress.built} indices built, {progress.found} found, in {time.perf_counter() - start:.0f} s; "
        f"{cache} holds {size / 1e6:,.1f} MB"
    )


if __name__ == "__main__":
    run_tool(main)
