"""How far sets of text lie apart in a model's embeddings: measured, as a table, as a panel of a figure."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np

from megatron_ext.analysis.embeddings import map_to_plane, separation
from megatron_ext.analysis.figures import Panel, colour, marker

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def measure_embeddings(embeddings: Mapping[str, np.ndarray], *, seed: int) -> dict[str, Any]:
    """Compare every two sets, and draw a map of all.

    Args:
        embeddings: fp32 ``[N, H]`` of each set.
        seed: of the folds and the map.

    Returns:
        ``pairs`` with the two numbers of every two sets, and ``map`` with the points of each set.
    """
    pairs = [
        {"sets": [first, second], **asdict(separation(one, other, seed=seed))}
        for (first, one), (second, other) in itertools.combinations(embeddings.items(), 2)
    ]
    points = map_to_plane(np.concatenate(list(embeddings.values())), seed=seed)
    ends = np.cumsum([len(part) for part in embeddings.values()])[:-1]
    parts = np.split(points.round(2), ends)
    return {
        "pairs": pairs,
        "map": {name: part.tolist() for name, part in zip(embeddings, parts, strict=True)},
    }


def embedding_table(report: Mapping[str, Any]) -> str:
    """The two numbers of every two sets, as text for a terminal."""
    lines = [
        f"Mean last hidden states under {report['model']['label']}; a linear classifier's share of samples "
        "put right",
        "(chance 50%, complete separation 100%), and neighbours from the other set (0 apart, 1 mixed)",
        f"{'sets':>32} {'samples':>12} {'classifier':>16} {'overlap':>8}",
    ]
    for pair in report["pairs"]:
        first, second = pair["sets"]
        sizes = [len(report["map"][name]) for name in pair["sets"]]
        lines.append(
            f"{f'{first} | {second}':>32} {f'{sizes[0]} | {sizes[1]}':>12} "
            f"{pair['accuracy']:>8.1%} ± {pair['accuracy_deviation']:<5.1%} {pair['overlap']:>8.2f}"
        )
    return "\n".join(lines)


def embedding_panels(report: Mapping[str, Any]) -> list[Panel]:
    """The map of all sets."""

    def draw(axis: Axes) -> None:
        for number, (name, points) in enumerate(report["map"].items()):
            x, y = np.array(points).T
            axis.scatter(
                x,
                y,
                s=9,
                marker=marker(number),
                color=colour(number),
                alpha=0.55,
                linewidths=0,
                label=name,
            )
        axis.set(title=f"t-SNE of embeddings: {report['model']['label']}", xticks=[], yticks=[])
        axis.spines[["top", "right"]].set_visible(True)
        axis.set(xlabel="only who is near whom has a meaning")
        axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.1), ncols=4, markerscale=2)

    return [draw]
