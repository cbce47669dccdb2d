"""How figures look, and how they become PNG files: one panel is one function that draws on one axis."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Panel = Callable[["Axes"], None]

# Okabe and Ito's palette without its yellow, which is too light on white: told apart by every kind of
# colour vision. Line styles and markers say the same a second time.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
LINES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 1)), (0, (8, 2)))
MARKERS = ("o", "^", "s", "D", "v", "P", "X")

_STYLE: Any = {
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.alpha": 0.25,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
    # Pieces of a tokenizer may hold dollar signs, which are no formulas.
    "text.parse_math": False,
}


def colour(index: int) -> str:
    """Colour of the series with this number."""
    return COLOURS[index % len(COLOURS)]


def line(index: int) -> Any:
    """Line style of the series with this number."""
    return LINES[_second(index) % len(LINES)]


def marker(index: int) -> str:
    """Marker of the series with this number."""
    return MARKERS[_second(index) % len(MARKERS)]


def _second(index: int) -> int:
    """Goes on by one when the colours begin again, so that the eighth series is not like the first."""
    return index + index // len(COLOURS)


def render(
    panels: Sequence[Panel], *, columns: int = 3, size: tuple[float, float] = (4.8, 4.0)
) -> bytes:
    """Draw panels side by side.

    Args:
        panels: what to draw; at least one.
        columns: panels in a row at most.
        size: width and height of a panel, in inches.

    Returns:
        A PNG file.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    columns = min(columns, len(panels))
    rows = math.ceil(len(panels) / columns)
    with pyplot.rc_context(_STYLE):
        figure, axes = pyplot.subplots(
            rows,
            columns,
            figsize=(size[0] * columns, size[1] * rows),
            layout="constrained",
            squeeze=False,
        )
        for axis, panel in zip(axes.flat, panels, strict=False):
            panel(axis)
        for axis in axes.flat[len(panels) :]:
            axis.set_axis_off()
        stream = io.BytesIO()
        # No date and no version: the same numbers give the same bytes.
        figure.savefig(stream, format="png", dpi=140, metadata={"Software": None})
        pyplot.close(figure)
    return stream.getvalue()


@cache
def _known_characters() -> frozenset[int]:
    from matplotlib import font_manager, ft2font

    path = font_manager.findfont(font_manager.FontProperties())
    return frozenset(ft2font.FT2Font(path).get_charmap())


def drawable(text: str, instead: str) -> str:
    """The text if matplotlib's font has all of its characters, else what to write instead of it."""
    return text if all(ord(character) in _known_characters() for character in text) else instead
