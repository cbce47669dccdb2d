#!/usr/bin/env python
"""Compare the losses of two runs, step by step.

    python tools/compare_losses.py runs/a/tensorboard runs/b/tensorboard --tolerance 1e-5
    python tools/compare_losses.py tests/integration/golden/unlearn.txt runs/b/tensorboard

Each side is a TensorBoard directory or a text file as `--write` makes it. Exit code 1 if a value
differs by more than the tolerance, or is missing on one side.
"""

import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_ext.exceptions import DataError
from tools.common import ToolParser, run_tool

Scalars = Mapping[str, Mapping[int, float]]

# Tags of losses; the rest of a TensorBoard directory is learning rates and sizes.
_LOSS_TAGS = ("lm loss", "unlearn loss", "forget loss", "replay loss", "mitigation kl", "grad-norm")


def read_scalars(path: Path) -> dict[str, dict[int, float]]:
    """Reads a TensorBoard directory or a text file of losses.

    Of several values for one step the last counts: a resumed run writes its steps again.

    Args:
        path: Directory with event files, or a file made by `format_scalars`.

    Returns:
        Values by tag and step, fp32 as they were written.

    Raises:
        DataError: The file is not in that form, or there is nothing at the path.
    """
    if path.is_dir():
        return _read_events(path)
    if not path.is_file():
        raise DataError(f"{path}: expected a TensorBoard directory or a text file, found nothing")
    return parse_scalars(path.read_text(), name=str(path))


def _read_events(directory: Path) -> dict[str, dict[int, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(directory), size_guidance={"scalars": 0})
    events.Reload()
    return {
        tag: {event.step: event.value for event in events.Scalars(tag)}
        for tag in events.Tags()["scalars"]
    }


def parse_scalars(text: str, *, name: str) -> dict[str, dict[int, float]]:
    """Reads the text of `format_scalars`; `name` is for messages.

    Raises:
        DataError: A line has another number of columns or no number in it.
    """
    rows = [line.split("\t") for line in text.splitlines() if line and not line.startswith("#")]
    if not rows or rows[0][0] != "step":
        raise DataError(f"{name}: expected a first line 'step', tab, tags; found {rows[:1]}")
    tags = rows[0][1:]
    scalars: dict[str, dict[int, float]] = {tag: {} for tag in tags}
    for row in rows[1:]:
        try:
            for tag, value in zip(tags, row[1:], strict=True):
                if value:
                    scalars[tag][int(row[0])] = float(value)
        except ValueError as error:
            raise DataError(
                f"{name}: expected {len(tags) + 1} numbers, found {row}: {error}"
            ) from error
    return scalars


def format_scalars(scalars: Scalars, *, tags: Sequence[str], comment: str = "") -> str:
    """Text of some tags: one line a step, tabs between columns, nine digits (all that fp32 has).

    A cell is empty where a tag has no value at a step that another one has, as after a change of the stage.
    """
    lines = [f"# {line}" for line in comment.splitlines()]
    lines.append("\t".join(("step", *tags)))
    for step in sorted({step for tag in tags for step in scalars[tag]}):
        cells = (f"{scalars[tag][step]:.9g}" if step in scalars[tag] else "" for tag in tags)
        lines.append("\t".join((str(step), *cells)))
    return "\n".join(lines) + "\n"


def relative_difference(expected: float, found: float) -> float:
    """Difference over the larger magnitude; infinite where one is NaN."""
    if math.isnan(expected) or math.isnan(found):
        return math.inf
    scale = max(abs(expected), abs(found))
    return abs(expected - found) / scale if scale else 0.0


def compare(expected: Scalars, found: Scalars, *, tags: Sequence[str]) -> dict[str, float]:
    """Largest relative difference of each tag over all steps; infinite where a step is missing."""
    return {
        tag: max(
            relative_difference(
                expected.get(tag, {}).get(step, math.nan), found.get(tag, {}).get(step, math.nan)
            )
            for step in expected.get(tag, {}).keys() | found.get(tag, {}).keys()
        )
        for tag in tags
    }


def main() -> None:
    """Parses the command line and compares."""
    parser = ToolParser(description=__doc__)
    parser.add_argument("expected", type=Path, help="TensorBoard directory or text file")
    parser.add_argument("found", type=Path, nargs="?", help="the other run")
    parser.add_argument("--tags", nargs="+", help="by default the losses that either side has")
    parser.add_argument("--tolerance", type=float, default=1e-5, help="relative, default 1e-5")
    parser.add_argument("--write", action="store_true", help="print the first as text and stop")
    args = parser.parse_args()
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
    print(table(expected, found, differences))
    if max(differences.values()) > args.tolerance:
        print(f"the runs differ by more than {args.tolerance:g}")
        sys.exit(1)


def table(expected: Scalars, found: Scalars, differences: Mapping[str, float]) -> str:
    """First and last value of each tag on both sides, and the largest difference of all steps."""
    width = max(len(tag) for tag in differences)
    lines = [
        f"{'':{width}}  {'step':>6}  {'expected':>14}  {'found':>14}  largest relative difference"
    ]
    for tag, difference in differences.items():
        left, right = expected.get(tag, {}), found.get(tag, {})
        steps = sorted(left.keys() | right.keys())
        for step in dict.fromkeys((steps[0], steps[-1])):
            values = [f"{side.get(step, math.nan):14.8g}" for side in (left, right)]
            lines.append(
                f"{tag if step == steps[0] else '':{width}}  {step:6d}  {'  '.join(values)}"
                + (f"  {difference:.2e} over {len(steps)} steps" if step == steps[0] else "")
            )
    return "\n".join(lines)


if __name__ == "__main__":
    run_tool(main)
