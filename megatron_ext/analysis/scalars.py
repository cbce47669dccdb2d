"""Scalars of runs: out of TensorBoard directories, as text, and one run against another."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from megatron_ext.exceptions import DataError

# By tag of a run: values by step.
Scalars = Mapping[str, Mapping[int, float]]


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
    try:
        text = path.read_text()
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}: expected a TensorBoard directory or a text file, found a file that is no text"
        ) from error
    return parse_scalars(text, name=str(path))


def _read_events(directory: Path) -> dict[str, dict[int, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    # It reports the end of every file that it reads, and warns of the steps that a resumed run writes again.
    logging.getLogger("tensorboard").setLevel(logging.ERROR)
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
    """Difference over the larger magnitude; infinite where one is NaN, or where one alone is infinite."""
    if expected == found:
        return 0.0
    if not math.isfinite(expected) or not math.isfinite(found):
        return math.inf
    scale = max(abs(expected), abs(found))
    return abs(expected - found) / scale


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
