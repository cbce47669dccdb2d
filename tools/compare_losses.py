#!/usr/bin/env python
"""Compare the losses of two runs, step by step.

    python tools/compare_losses.py runs/a/tensorboard runs/b/tensorboard --tolerance 1e-5
    python tools/compare_losses.py tests/integration/golden/unlearn.txt runs/b/tensorboard

Each side is a TensorBoard directory or a text file as `--write` makes it. Exit code 1 if a value
differs by more than the tolerance, or is missing on one side.
"""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_ext.analysis.scalars import (
    Scalars,
    compare,
    format_scalars,
    read_scalars,
    relative_difference,
)
from megatron_ext.exceptions import ConfigError, DataError
from tools.common import ToolParser, run_tool

# Tags of losses; the rest of a TensorBoard directory is learning rates and sizes.
_LOSS_TAGS = ("lm loss", "unlearn loss", "forget loss", "replay loss", "mitigation kl", "grad-norm")


def main() -> None:
    """Parses the command line and compares."""
    parser = ToolParser(description=__doc__)
    parser.add_argument("expected", type=Path, help="TensorBoard directory or text file")
    parser.add_argument("found", type=Path, nargs="?", help="the other run")
    parser.add_argument(
        "--tags", nargs="+", help="TensorBoard tags to compare; default: all losses of either side"
    )
    parser.add_argument(
        "--tolerance", type=float, default=1e-5, help="relative tolerance, default 1e-5"
    )
    parser.add_argument(
        "--write", action="store_true", help="print the losses of the first run as text and stop"
    )
    args = parser.parse_args()
    if not args.tolerance >= 0:  # nor NaN, below which everything is
        raise ConfigError(f"--tolerance: expected 0 or more, found {args.tolerance}")
    expected = read_scalars(args.expected)
    found = {} if args.found is None else read_scalars(args.found)
    for side, scalars in ((args.expected, expected), (args.found, found)):
        if side is not None and not scalars:
            raise DataError(
                f"{side}: expected a folder with TensorBoard's event files, found none in it"
            )
    tags = args.tags or [tag for tag in _LOSS_TAGS if tag in expected or tag in found]
    missing = [tag for tag in tags if not expected.get(tag) and not found.get(tag)]
    if missing or not tags:
        names = ", ".join(missing or _LOSS_TAGS)
        raise DataError(f"{args.expected}: expected values of {names}, found none")
    if args.write:
        print(format_scalars(expected, tags=tags), end="")
        return
    if args.found is None:
        parser.error("two runs are needed, or --write")
    differences = compare(expected, found, tags=tags)
    print(table(expected, found, tags=tags))
    if max(differences.values()) > args.tolerance:
        print(f"the runs differ by more than {args.tolerance:g}")
        sys.exit(1)


def table(expected: Scalars, found: Scalars, *, tags: Sequence[str]) -> str:
    """First and last value of each tag on both sides, and the largest difference of the steps of both."""
    width = max(len(tag) for tag in tags)
    lines = [
        f"{'':{width}}  {'step':>6}  {'expected':>14}  {'found':>14}  largest relative difference"
    ]
    for tag in tags:
        left, right = expected.get(tag, {}), found.get(tag, {})
        steps = sorted(left.keys() | right.keys())
        for step in dict.fromkeys((steps[0], steps[-1])):
            values = (
                f"{side[step]:14.8g}" if step in side else f"{'-':>14}" for side in (left, right)
            )
            line = f"{tag if step == steps[0] else '':{width}}  {step:6d}  {'  '.join(values)}"
            lines.append(line + (f"  {_verdict(left, right)}" if step == steps[0] else ""))
    return "\n".join(lines)


def _verdict(left: Mapping[int, float], right: Mapping[int, float]) -> str:
    """How far the steps of both runs differ, and how many are in one run only."""
    both = left.keys() & right.keys()
    parts = []
    if both:
        worst = max(relative_difference(left[step], right[step]) for step in both)
        parts = [f"{worst:.2e} over {len(both)} steps"]
    for name, count in (("first", len(left) - len(both)), ("second", len(right) - len(both))):
        if count:
            parts.append(f"only in the {name}" if not both else f"{count} only in the {name}")
    return ", ".join(parts)


if __name__ == "__main__":
    run_tool(main)
