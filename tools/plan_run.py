#!/usr/bin/env python
"""What a run of pretrain_unlearn.py would cost, from the flags that would start it.

    python tools/plan_run.py --gpus 64 -- --num-layers 32 --hidden-size 2048 ... --train-iters 1000

Prints parameters, tokens, data epochs, memory of every pipeline stage by part, time and cost at an
assumed model FLOPs utilisation, and the size of a checkpoint; with --rank-layouts also the layouts
that fit. Starts nothing and imports no torch, but for --check, which builds the model of one rank on
the meta device, as the entry point would, and compares. See docs/planning.md.
"""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_ext.data.atomic import check_place, write_atomically
from megatron_ext.exceptions import ConfigError, flag_name
from megatron_ext.gpus import GPUS, Cluster
from megatron_ext.planning.checks import check_spelling
from megatron_ext.planning.flags import entry_flags
from megatron_ext.planning.plan import plan
from megatron_ext.planning.report import render
from tools.common import BEHIND, ToolParser, run_tool


def parse_options(words: Sequence[str]) -> Namespace:
    """The tool's own flags."""
    return _parser().parse_args(words)


def refuse_own(words: Sequence[str]) -> None:
    """Refuse the tool's own flags among those of the run, where they would be passed over.

    Raises:
        ConfigError: names the flag, or the one that it is almost.
    """
    own = [flag for flag in _parser()._option_string_actions if flag not in ("-h", "--help")]
    for word in words:
        if word.partition("=")[0] in own:
            raise ConfigError(
                f"{word}: expected flags of the run behind --, found one of this tool: put it before --"
            )
    check_spelling(words, known=own, place=" before --")


def _parser() -> ToolParser:
    parser = ToolParser(description=__doc__, hint=BEHIND)
    add = parser.add_argument
    add("--gpus", type=int, required=True, help="number of ranks of the run, on all nodes together")
    add(
        "--gpu-type",
        choices=(*GPUS, "CPU"),
        default="H100",
        help="type of GPU, default %(default)s",
    )
    add("--gpus-per-node", type=int, default=8, help="GPUs of a node, default %(default)s")
    add(
        "--mfu",
        type=float,
        default=0.45,
        help="model FLOPs utilisation (MFU) to assume, default %(default)s",
    )
    add(
        "--peak-flops",
        type=float,
        help="peak FLOP/s of a GPU; default: the vendor's dense bf16 figure",
    )
    add("--price", type=float, help="price of a GPU-hour, in any currency")
    add(
        "--write-bandwidth",
        type=float,
        help="write speed of a checkpoint, all ranks together, in GB/s",
    )
    add(
        "--rank-layouts",
        type=int,
        nargs="?",
        const=10,
        default=0,
        metavar="N",
        help="list the N layouts that fit and are fastest by a model of the step (10 without N)",
    )
    add(
        "--check",
        action="store_true",
        help="compare the plan with the model that pretrain_unlearn.py builds on one rank",
    )
    add("--check-rank", type=int, default=0, help="the rank for --check, default %(default)s")
    add("--json", action="store_true", help="print the numbers as JSON instead of text")
    add("--output", type=Path, help="also write the numbers to this JSON file")
    return parser


def cluster(options: Namespace) -> Cluster:
    """What the flags say of the machines.

    Raises:
        ConfigError: a number that no cluster has, or a rank that is not one of it.
    """
    for name in ("gpus", "gpus_per_node", "mfu", "peak_flops", "price", "write_bandwidth"):
        value = getattr(options, name)
        if value is not None and not value > 0:  # nor NaN
            raise ConfigError(f"{flag_name(name)}: expected a number above 0, found {value}")
    if options.mfu > 1:
        raise ConfigError(f"--mfu: expected a share of the peak, at most 1, found {options.mfu}")
    if options.rank_layouts < 0:
        raise ConfigError(f"--rank-layouts: expected at least 0, found {options.rank_layouts}")
    if not 0 <= options.check_rank < options.gpus:
        raise ConfigError(
            f"--check-rank: expected 0 to {options.gpus - 1}, found {options.check_rank}"
        )
    gpu = GPUS.get(options.gpu_type)
    if gpu is None and options.peak_flops is None:
        raise ConfigError("--peak-flops: expected with --gpu-type CPU, found none")
    return Cluster(
        gpus=options.gpus,
        name=options.gpu_type,
        gpu=gpu,
        peak_flops=options.peak_flops or (gpu.flops if gpu else 0.0),
        mfu=options.mfu,
        gpus_per_node=options.gpus_per_node,
        price=options.price,
        write_bandwidth=options.write_bandwidth and options.write_bandwidth * 1e9,
    )


def main() -> None:
    """Parse, plan, print, check."""
    words = sys.argv[1:]
    cut = words.index("--") if "--" in words else len(words)
    options, run = parse_options(words[:cut]), words[cut + 1 :]
    refuse_own(run)
    if options.output is not None:
        check_place(options.output, flag="--output")
    numbers = plan(entry_flags(run), cluster(options), ranked=options.rank_layouts)
    failure = None
    if options.check:
        from megatron_ext.planning.check import check_rank  # torch and Megatron

        numbers["check"], failure = check_rank(run, gpus=options.gpus, rank=options.check_rank)
    text = json.dumps(numbers, indent=1)
    if options.output is not None:
        write_atomically(options.output, f"{text}\n".encode(), overwrite=True)
    print(text if options.json else render(numbers))
    if failure is not None:
        raise failure


if __name__ == "__main__":
    run_tool(main)
