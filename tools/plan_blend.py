#!/usr/bin/env python
r"""Find the weights of a blend from the shares of its sources; afterwards, count what a run has read.

    python tools/plan_blend.py --tokens 300e9 --seq-length 4096 --global-batch-size 1024 \
        --dataset 2% data/qa_text_document --dataset rest data/web_*_text_document.idx
    python tools/plan_blend.py --run ckpt/synth

The first prints what to write after --data-path, with samples, tokens and epochs of every source. A share
is 2%, a number of tokens (6e9) or the rest; the data sets of a source are read equally often.
With --forget and --forget-batch-size it plans the batches of an unlearning run, whose --tokens are those of
both blends. The second counts what a run consumed up to its last checkpoint, sample by sample, in the index
that it read.
"""

from __future__ import annotations

import argparse
import json
import math
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_ext.data.blend import MOST_EPOCHS, Part, Source, bare_prefix, plan_blend
from megatron_ext.exceptions import ConfigError, flag_name
from tools.common import ToolParser, run_tool

# More than any run reads, and few enough for whole numbers in floating point.
_MOST = 1e15
_ROLES = {"learn": "--data-path", "forget": "--forget-data-path", "replay": "--data-path"}


def parse_args(argv: Sequence[str]) -> argparse.Namespace:
    """Parse the command line.

    Raises:
        ConfigError: flags are missing or do not go together.
    """
    parser = ToolParser(description=__doc__, allow_abbrev=False)
    add = parser.add_argument
    source: dict[str, Any] = {"action": "append", "nargs": "+", "metavar": "SHARE PREFIX"}
    add(
        "--dataset",
        **source,
        help="a source of --data-path: its share and its data sets; may be repeated",
    )
    add("--forget", **source, help="the same for --forget-data-path")
    add("--tokens", type=float, help="number of tokens that the run reads")
    add("--seq-length", type=int, help="tokens per sample")
    add(
        "--global-batch-size",
        type=int,
        help="samples per batch; the run is rounded up to whole batches",
    )
    add("--forget-batch-size", type=int, help="forgotten samples per batch")
    add("--split", default="969,30,1", help="--split of the run; default: Megatron's, %(default)s")
    add(
        "--run", metavar="CHECKPOINTS", help="checkpoint directory of a run: count what it has read"
    )
    add("--iteration", type=int, help="count up to this checkpoint; default: the last")
    add("--json", action="store_true", help="print the numbers as JSON instead of text")
    options = parser.parse_args(argv)
    if options.run is not None:
        if options.dataset or options.forget or options.tokens:
            raise ConfigError("--run: expected no blend to plan beside it, found one")
        return options
    for name in ("dataset", "tokens", "seq_length"):
        if not getattr(options, name):
            flag = flag_name(name)
            raise ConfigError(f"{flag}: expected it, or --run to count, found neither")
    for name in ("tokens", "seq_length", "global_batch_size"):
        value = getattr(options, name)
        if value is not None and not 0 < value <= _MOST:
            flag = flag_name(name)
            raise ConfigError(
                f"{flag}: expected a number above 0, at most {_MOST:g}, found {value:g}"
            )
    if options.forget and not (options.global_batch_size and options.forget_batch_size):
        raise ConfigError("--forget: expected --global-batch-size and --forget-batch-size with it")
    return options


def _sources(words: Sequence[Sequence[str]], flag: str) -> list[Source]:
    for word in words:
        if len(word) < 2:
            raise ConfigError(f"{flag}: expected a share and data sets, found {' '.join(word)}")
    return [Source(word[0], [bare_prefix(name) for name in word[1:]]) for word in words]


def plan(options: argparse.Namespace) -> dict[str, Any]:
    """All numbers of a blend that is planned."""
    samples = math.ceil(options.tokens / options.seq_length)
    iterations = None
    if options.global_batch_size:
        iterations = math.ceil(samples / options.global_batch_size)
        samples = iterations * options.global_batch_size
    sides = {"replay" if options.forget else "learn": (options.dataset, "--dataset", samples)}
    if options.forget:
        forgotten = (iterations or 0) * options.forget_batch_size
        if not 0 < forgotten < samples:
            raise ConfigError(
                f"--forget-batch-size: expected 1 to {options.global_batch_size - 1}, found "
                f"{options.forget_batch_size}"
            )
        sides["replay"] = (options.dataset, "--dataset", samples - forgotten)
        sides["forget"] = (options.forget, "--forget", forgotten)
    roles = {}
    for role, (words, flag, count) in sides.items():
        sources = _sources(words, flag)
        parts = plan_blend(
            sources,
            samples=count,
            seq_length=options.seq_length,
            split=options.split,
            flag=flag,
            tokens=options.tokens * count / samples,
        )
        roles[role] = {
            "flag": _ROLES[role],
            "samples": count,
            "words": [word for part in parts for word in (str(part.samples), part.prefix)],
            "sources": _of_sources(sources, parts, count),
            "datasets": [
                {"prefix": p.prefix, "samples": p.samples, "tokens": p.tokens, "epochs": p.epochs}
                for p in parts
            ],
        }
    tokens = samples * options.seq_length
    return {"tokens": tokens, "samples": samples, "iterations": iterations, "roles": roles}


def _of_sources(sources: Sequence[Source], parts: Sequence[Part], count: int) -> list[Any]:
    rows = []
    for number, source in enumerate(sources):
        mine = [part for part in parts if part.source == number]
        samples, tokens = (sum(getattr(p, name) for p in mine) for name in ("samples", "tokens"))
        rows.append(
            {
                "name": _name(source.prefixes),
                "share": samples / count,
                "samples": samples,
                "tokens": tokens,
                "epochs": tokens / sum(part.available for part in mine),
            }
        )
    return rows


def _name(prefixes: Sequence[str]) -> str:
    more = f" and {len(prefixes) - 1} more" if len(prefixes) > 1 else ""
    return Path(prefixes[0]).name + more


def render_plan(numbers: dict[str, Any]) -> str:
    """The plan as text."""
    steps = f", {numbers['iterations']:,} iterations" if numbers["iterations"] else ""
    lines = [f"{numbers['tokens']:,} tokens, {numbers['samples']:,} samples{steps}"]
    for role, side in numbers["roles"].items():
        lines += ["", f"{role:40}{'share':>10}{'samples':>16}{'tokens':>20}{'epochs':>9}"]
        for row in side["sources"]:
            lines.append(
                f"{row['name']:40}{row['share']:>10.4%}{row['samples']:>16,}{row['tokens']:>20,}"
                f"{row['epochs']:>9.3f}"
            )
        for row in side["sources"]:
            if row["epochs"] > MOST_EPOCHS:
                lines.append(
                    f"warning: {row['name']} is read {row['epochs']:.1f} times, more than {MOST_EPOCHS}"
                )
        lines += ["", f"{side['flag']} {shlex.join(side['words'])}"]
    return "\n".join(lines)


def counted(options: argparse.Namespace) -> dict[str, Any]:
    """All numbers of what a run has consumed."""
    from megatron_ext.checkpoint.inspect import open_checkpoint
    from megatron_ext.data.consumed import count, shares

    checkpoint = open_checkpoint(
        options.run, flag="--run", iteration=options.iteration, iteration_flag="--iteration"
    )
    found = count(checkpoint.args, path=checkpoint.path)
    wanted: dict[str, float] = {}
    for one in found.datasets:
        wanted[one.role] = wanted.get(one.role, 0.0) + one.expected
    return {
        "checkpoint": str(checkpoint.path),
        "consumed_samples": checkpoint.args.consumed_train_samples,
        "unrecorded_samples": found.unrecorded,
        "skipped_samples": getattr(checkpoint.args, "skipped_train_samples", 0),
        "datasets": [
            {
                "role": one.role,
                "prefix": one.prefix,
                "samples": one.samples,
                "tokens": one.samples * found.tokens_per_sample,
                "share": share,
                "wanted": one.expected / wanted[one.role] if wanted[one.role] else 0.0,
            }
            for one, share in zip(found.datasets, shares(found.datasets), strict=True)
        ],
    }


def render_count(numbers: dict[str, Any]) -> str:
    """The count as text."""
    lines = [
        f"{numbers['checkpoint']}: {numbers['consumed_samples']:,} samples consumed",
        "",
        f"{'':8}{'data set':40}{'samples':>16}{'tokens':>20}{'share':>11}{'by weight':>11}",
    ]
    for row in numbers["datasets"]:
        lines.append(
            f"{row['role']:8}{Path(row['prefix']).name:40}{row['samples']:>16,}{row['tokens']:>20,}"
            f"{row['share']:>11.4%}{row['wanted']:>11.4%}"
        )
    for name, what in (
        ("unrecorded", "were consumed before the run kept a record of its data: not counted"),
        ("skipped", "of these were read but not trained on"),
    ):
        if number := numbers[f"{name}_samples"]:
            lines.append(f"{number:,} samples {what}")
    return "\n".join(lines)


def main() -> None:
    """Plan or count."""
    options = parse_args(sys.argv[1:])
    numbers = plan(options) if options.run is None else counted(options)
    text = render_plan(numbers) if options.run is None else render_count(numbers)
    print(json.dumps(numbers, indent=1) if options.json else text)


if __name__ == "__main__":
    run_tool(main)
