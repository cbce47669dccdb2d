"""Token densities and structural tokens of sets of text: measured, as a table, as panels of a figure."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy.signal import find_peaks

from megatron_ext.analysis.figures import Panel, colour, drawable
from megatron_ext.analysis.pieces import Pieces
from megatron_ext.analysis.samples import describe_dataset, read_samples
from megatron_ext.analysis.tokens import (
    MIN_DOCUMENTS,
    MIN_RATIO,
    TokenCounts,
    count_tokens,
    density,
    find_overuse,
)
from megatron_ext.data.manifest import check_prefix
from megatron_ext.data.tokenizers import TokenizerSpec, tokenizer_digest
from megatron_ext.exceptions import ConfigError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# The drawn curves are smoothed this much more than the density that peaks are found in, so that a
# vocabulary of 100,000 ids can be looked at: the kernel is this share of the vocabulary.
_DRAWN_BANDWIDTH = 1 / 250
_DRAWN_POINTS = 600
_BARS, _LABELS = 14, 4


def measure_tokens(options: Namespace, sets: Mapping[str, str]) -> dict[str, Any]:
    """Draw documents of every set, and compare each set's tokens with the baseline's.

    Args:
        options: ``tokenizer_type``, ``tokenizer_model``, ``baseline``, ``samples``, ``length``, ``seed``,
            ``bandwidth``.
        sets: dataset prefix of each set.

    Returns:
        What ``tokens.json`` holds.

    Raises:
        ConfigError: fewer than two sets, or a baseline or a tokenizer that does not exist.
        DataError: a dataset is missing, broken or of another tokenizer.
    """
    baseline = options.baseline or next(iter(sets))
    if baseline not in sets:
        raise ConfigError(f"--baseline: expected one of {', '.join(sets)}, found {baseline}")
    if len(sets) < 2:
        raise ConfigError(f"--data: expected at least two sets to compare, found {len(sets)}")
    spec = TokenizerSpec(
        tokenizer_type=options.tokenizer_type, tokenizer_model=options.tokenizer_model
    )
    pieces = Pieces(spec)
    digest = tokenizer_digest(spec)
    for prefix in sets.values():
        check_prefix(prefix, vocab_size=pieces.vocab_size, tokenizer_digest=digest)
    counts = {name: _count(prefix, name, options, pieces) for name, prefix in sets.items()}
    width = max(options.bandwidth, pieces.vocab_size * _DRAWN_BANDWIDTH)
    grid = np.linspace(0, pieces.vocab_size - 1, min(_DRAWN_POINTS, pieces.vocab_size)).astype(int)
    return {
        "verb": "tokens",
        "settings": vars(options),
        "vocab_size": pieces.vocab_size,
        "special": {str(token): pieces.name(token) for token in pieces.special},
        "baseline": baseline,
        "drawn_bandwidth": width,
        "grid": grid.tolist(),
        "sets": {
            name: {
                "data": describe_dataset(prefix),
                "documents": len(counts[name].samples),
                "tokens": counts[name].total,
                "density": density(counts[name].rates, bandwidth=width)[grid].tolist(),
            }
            for name, prefix in sets.items()
        },
        "overuse": {
            name: _compare(found, counts[baseline], options, pieces)
            for name, found in counts.items()
            if name != baseline
        },
    }


def _count(prefix: str, name: str, options: Namespace, pieces: Pieces) -> TokenCounts:
    samples = read_samples(prefix, count=options.samples, length=options.length, seed=options.seed)
    return count_tokens(
        samples, vocab_size=pieces.vocab_size, special=pieces.special, name=f"--data {name}"
    )


def _compare(
    counts: TokenCounts, baseline: TokenCounts, options: Namespace, pieces: Pieces
) -> dict[str, Any]:
    """The tokens in the peaks of one set, and how much of the set the structural ones are."""
    found = find_overuse(counts, baseline, bandwidth=options.bandwidth, seed=options.seed)
    structural = [item.token for item in found if item.structural]
    return {
        "structural_share": float(counts.rates[structural].sum()),
        "baseline_structural_share": float(baseline.rates[structural].sum()),
        "tokens": [
            {"piece": pieces.name(item.token), "structural": item.structural, **asdict(item)}
            for item in found
        ],
    }


def structural_tokens(report: Mapping[str, Any], name: str) -> list[dict[str, Any]]:
    """The structural tokens of a set, the most over-used first."""
    return [token for token in report["overuse"][name]["tokens"] if token["structural"]]


def token_table(report: Mapping[str, Any], *, top: int) -> str:
    """The structural tokens of every set, as text for a terminal."""
    baseline = report["baseline"]
    lines = []
    for name, overuse in report["overuse"].items():
        tokens = structural_tokens(report, name)
        size, other = report["sets"][name], report["sets"][baseline]
        lines += [
            f"{name} ({size['documents']} documents, {size['tokens']:,} tokens) against {baseline} "
            f"({other['documents']} documents, {other['tokens']:,} tokens)",
            f"{len(tokens)} structural tokens: at least {MIN_RATIO:g} times as frequent (95% interval), in "
            f"{MIN_DOCUMENTS:.0%} of the documents or more",
        ]
        if tokens:
            lines.append(
                f"together {overuse['structural_share']:.1%} of {name}, "
                f"{overuse['baseline_structural_share']:.1%} of {baseline}"
            )
            lines.append(
                f"{'piece':>16} {'id':>7} {'over-use':>9} {'95% interval':>17} {'count':>8} "
                f"{baseline[:8]:>8} {'documents':>10} {baseline[:10]:>10}"
            )
        lines += [_row(token) for token in tokens[:top]]
        if len(tokens) > top:
            lines.append(f"... and {len(tokens) - top} more, in the JSON file")
        lines.append("")
    return "\n".join(lines).rstrip()


def _row(token: Mapping[str, Any]) -> str:
    ends = f"{_times(token['low'])} - {_times(token['high'])}"
    return (
        f"{token['piece']:>16} {token['token']:>7} {_times(token['ratio']):>9} {ends:>17} "
        f"{token['count']:>8} {token['baseline_count']:>8} "
        f"{token['documents']:>10.1%} {token['baseline_documents']:>10.1%}"
    )


def _times(ratio: float) -> str:
    return f"{ratio:.1f}" if ratio < 100 else f"{ratio:.0f}" if ratio < 1e5 else f"{ratio:.0e}"


def token_panels(report: Mapping[str, Any]) -> list[Panel]:
    """For each set its density beside the baseline's, and its structural tokens."""
    panels: list[Panel] = []
    for name in report["overuse"]:
        panels.append(partial(_draw_density, report=report, name=name))
        panels.append(partial(_draw_overuse, report=report, name=name))
    return panels


def _draw_density(axis: Axes, report: Mapping[str, Any], name: str) -> None:
    baseline = report["baseline"]
    grid = np.array(report["grid"])
    curves = {key: np.array(report["sets"][key]["density"]) for key in (baseline, name)}
    axis.plot(grid, curves[baseline], color="black", linewidth=1, label=baseline)
    axis.plot(grid, curves[name], color=colour(1), label=name)
    axis.fill_between(
        grid,
        curves[baseline],
        curves[name],
        where=curves[name] > curves[baseline],
        color=colour(1),
        alpha=0.15,
        linewidth=0,
    )
    for place, rank, label in _named_peaks(report, name, curves[name] - curves[baseline]):
        axis.annotate(
            label,
            (grid[place], curves[name][place]),
            # One under the other in the middle, where the curves are low.
            xytext=(0.55, 0.93 - 0.08 * rank),
            textcoords="axes fraction",
            ha="center",
            va="center",
            fontsize=9,
            arrowprops={"arrowstyle": "-", "linewidth": 0.7, "color": "grey"},
        )
    axis.set_ylim(0, 1.15 * max(curve.max() for curve in curves.values()))
    axis.set(
        title=f"Density over token ids: {name}",
        xlabel=_kernels(report),
        ylabel="density",
    )
    axis.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    axis.legend()


def _kernels(report: Mapping[str, Any]) -> str:
    """What the density is drawn with, and what its peaks were found with."""
    drawn, found = round(report["drawn_bandwidth"], 1), report["settings"]["bandwidth"]
    return f"token id (drawn with a kernel of {drawn:g} ids; peaks are found with {found:g})"


def _named_peaks(
    report: Mapping[str, Any], name: str, excess: np.ndarray
) -> list[tuple[int, int, str]]:
    """Peaks of the drawn excess that structural tokens make: grid point, rank of its label, label."""
    grid = np.array(report["grid"])
    tokens = structural_tokens(report, name)
    places, _ = find_peaks(np.pad(excess, 1), height=0.0)
    largest = sorted(places - 1, key=lambda place: -excess[place])[:_LABELS]
    named: list[tuple[int, int, str]] = []
    for place in map(int, largest):
        near = [
            token
            for token in tokens
            if abs(token["token"] - grid[place]) <= 1.5 * report["drawn_bandwidth"]
        ]
        near.sort(key=lambda token: token["baseline_rate"] - token["rate"])
        if near:
            pieces = [drawable(token["piece"], f"id {token['token']}") for token in near[:3]]
            named.append((place, len(named), "  ".join(pieces)))
    return named


def _draw_overuse(axis: Axes, report: Mapping[str, Any], name: str) -> None:
    baseline = report["baseline"]
    tokens = structural_tokens(report, name)[:_BARS]
    axis.set_title(f"Structural tokens of {name}")
    if not tokens:
        axis.text(0.5, 0.5, "none found", ha="center", transform=axis.transAxes)
        axis.set(xticks=[], yticks=[])
        return
    rows = np.arange(len(tokens))
    ratio, low, high = (
        np.array([token[key] for token in tokens]) for key in ("ratio", "low", "high")
    )
    # An interval without an upper end (the baseline lacks the token) must not squeeze all others.
    right = 4 * ratio.max()
    axis.hlines(rows, low, np.minimum(high, right), color=colour(1), linewidth=2.5, alpha=0.5)
    axis.plot(ratio, rows, "o", color=colour(1), markersize=5)
    axis.axvline(1, color="black", linewidth=1)
    axis.set_xscale("log")
    axis.set_xlim(0.7, right)
    axis.xaxis.set_major_formatter(lambda value, _: f"{value:,.10g}")
    labels = [drawable(token["piece"], f"id {token['token']}") for token in tokens]
    axis.set_yticks(rows, labels)
    axis.invert_yaxis()
    axis.set_xlabel(f"times as frequent as in {baseline} (95% interval)")
    axis.grid(axis="y", visible=False)
