"""Loss curves of runs, from what they logged to TensorBoard."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from megatron_ext.analysis.figures import Panel, colour, line
from megatron_ext.analysis.scalars import Scalars

if TYPE_CHECKING:
    from matplotlib.axes import Axes

TAGS = {
    "lm loss": "cross-entropy, nats a token",
    "forget loss": "forgetting loss of a token",
    "forget token probability": "mean probability of a forgotten token",
    "replay loss": "cross-entropy of replayed text, nats",
    "mitigation kl": "KL(reference || model), nats a token",
}
# More points than this in a curve cannot be seen.
_POINTS = 1000


def loss_panels(runs: Mapping[str, Scalars], *, order: Mapping[str, int]) -> list[Panel]:
    """One panel for each loss that a run logged, with a curve for each run that did.

    Args:
        runs: scalars by name of the run.
        order: number of each run's colour.
    """
    return [
        partial(_draw, runs=runs, tag=tag, order=order)
        for tag in TAGS
        if any(tag in scalars for scalars in runs.values())
    ]


def _draw(axis: Axes, runs: Mapping[str, Scalars], tag: str, order: Mapping[str, int]) -> None:
    from matplotlib.ticker import MaxNLocator

    for name, scalars in runs.items():
        if tag not in scalars:
            continue
        steps, values = np.array(sorted(scalars[tag].items())).T
        chosen = np.unique(np.linspace(0, len(steps) - 1, _POINTS).astype(int))
        number = order[name]
        axis.plot(
            steps[chosen],
            values[chosen],
            color=colour(number),
            linestyle=line(number),
            marker="." if len(chosen) < 30 else None,
            label=name,
        )
    axis.set(title=tag, xlabel="step", ylabel=TAGS[tag])
    axis.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True))
    axis.legend()


def loss_rows(runs: Mapping[str, Scalars]) -> list[tuple[str, ...]]:
    """For each run and loss: steps, first and last value, as text."""
    rows: list[tuple[str, ...]] = []
    for name, scalars in runs.items():
        for tag in TAGS:
            if tag in scalars:
                points = sorted(scalars[tag].items())
                (first, start), (last, end) = points[0], points[-1]
                rows.append((f"{name}, {tag}", f"{first} - {last}", f"{start:.4g}", f"{end:.4g}"))
    return rows
