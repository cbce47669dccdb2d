"""How the perplexity of sets of text shifts from model to model: as numbers, as a table, as panels.

Source: figure 4 of arXiv 2406.12397: synthetic training lowers the mean and the variance of the perplexity of
instruction data. Every model scores the same samples, so shifts are measured sample by sample.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy.stats import gaussian_kde

from megatron_ext.analysis.figures import Panel, colour, line
from megatron_ext.analysis.statistics import interval, perplexity, resampled_sums

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Models as far away as gradient ascent leaves them are drawn at the edge, so that the others can be seen:
# this many nats above the largest median.
_REACH = 4.0


def add_shifts(report: dict[str, Any], *, seed: int) -> None:
    """Add mean and variance of every set under every model, and the shift from the first model.

    Adds ``summary`` to each set: for ``loss`` (log-perplexity, in nats) and ``perplexity`` the ``mean`` and
    ``variance`` over the samples, and, in models after the first, ``shift`` of the mean and
    ``variance_ratio``, each with ``value`` and the ends ``low`` and ``high`` of its 95% bootstrap
    interval over samples.

    Args:
        report: what ``perplexity.json`` holds, at least two samples a set; changed in place.
        seed: of the bootstrap.
    """
    models = list(report["models"].values())
    for name in models[0]["sets"]:
        base = np.array(models[0]["sets"][name]["loss"])
        for number, model in enumerate(models):
            scores = model["sets"][name]
            loss = np.array(scores["loss"])
            scores["summary"] = {
                kind: {
                    "mean": float(values.mean()),
                    "variance": _variance(values),
                    **(compare(values, other, seed=seed) if number else {}),
                }
                for kind, values, other in (
                    ("loss", loss, base),
                    ("perplexity", perplexity(loss), perplexity(base)),
                )
            }


def compare(values: np.ndarray, base: np.ndarray, *, seed: int = 1234) -> dict[str, Any]:
    """Shift of the mean and ratio of the variances of the same samples under two models.

    Args:
        values: fp64 ``[n]``, of one model.
        base: fp64 ``[n]``, of the model that it is compared with.
        seed: of the bootstrap.

    Returns:
        ``shift`` and ``variance_ratio``, each with ``value``, ``low`` and ``high``; no ratio if the base
        has no variance.
    """
    # Around the means, so that the squares do not cancel; the shift between the means is put back.
    centred, other = values - values.mean(), base - base.mean()
    columns = np.stack((centred, centred**2, other, other**2), axis=1)
    means = resampled_sums(columns, generator=np.random.default_rng(seed)) / len(values)
    shift = values.mean() - base.mean()
    low, high = interval(shift + means[:, 0] - means[:, 2])
    found = {"shift": {"value": float(shift), "low": float(low), "high": float(high)}}
    variances = [means[:, 1] - means[:, 0] ** 2, means[:, 3] - means[:, 2] ** 2]
    if _variance(base) > 0:
        low, high = interval(variances[0] / np.maximum(variances[1], 1e-300))
        ratio = _variance(values) / _variance(base)
        found["variance_ratio"] = {"value": ratio, "low": float(low), "high": float(high)}
    return found


def _variance(values: np.ndarray) -> float:
    return float(values.var(ddof=1))


def perplexity_table(report: Mapping[str, Any]) -> str:
    """Perplexities, mean probabilities, variances and shifts, as text for a terminal."""
    models = list(report["models"].values())
    base = models[0]["label"]
    lines = []
    for name in models[0]["sets"]:
        count = len(models[0]["sets"][name]["loss"])
        lines += [
            f"{name}: {count} samples; shifts from {base} with 95% bootstrap intervals",
            f"{'model':>20} {'perplexity':>11} {'mean p':>7} {'log mean':>9} {'variance':>9} "
            f"{'shift of the log mean':>26} {'ratio of variances':>22}",
        ]
        for model in models:
            scores = model["sets"][name]
            summary = scores["summary"]["loss"]
            probability = np.average(scores["probability"], weights=scores["tokens"])
            lines.append(
                f"{model['label']:>20} {_short(scores['corpus_perplexity']):>11} {probability:>7.4f} "
                f"{summary['mean']:>9.3f} {summary['variance']:>9.3f} "
                f"{_interval(summary.get('shift'), '+.3f'):>26} "
                f"{_interval(summary.get('variance_ratio'), '.2f'):>22}"
            )
        lines.append("")
    lines.append(
        "perplexity, mean p: of the set as one text, every token counting once; mean p: mean probability of "
        "a token"
    )
    return "\n".join(lines)


def _short(value: float) -> str:
    return f"{value:.2f}" if value < 1e4 else f"{value:.1e}"


def _interval(found: Mapping[str, float] | None, form: str) -> str:
    if found is None:
        return ""
    return f"{found['value']:{form}} [{found['low']:{form}}, {found['high']:{form}}]"


def perplexity_panels(report: Mapping[str, Any]) -> list[Panel]:
    """For each set the density of its samples' perplexities under every model."""
    sets = next(iter(report["models"].values()))["sets"]
    return [partial(_draw, report=report, name=name) for name in sets]


def _draw(axis: Axes, report: Mapping[str, Any], name: str) -> None:
    values = {m["label"]: np.array(m["sets"][name]["loss"]) for m in report["models"].values()}
    low = min(loss.min() for loss in values.values())
    medians = sorted(float(np.median(loss)) for loss in values.values())
    middle = medians[(len(medians) - 1) // 2]
    high = min(max(float(loss.max()) for loss in values.values()), middle + _REACH)
    margin = 0.2 * (high - low) + 0.1
    grid = np.linspace(low - margin, high + margin, 400)
    for number, (label, loss) in enumerate(values.items()):
        mean = f"{label} (mean {loss.mean():.2f}, var {_variance(loss):.2f})"
        if loss.std() < 1e-9:
            axis.axvline(loss[0], color=colour(number), linestyle=line(number), label=mean)
            continue
        if np.median(loss) > high:
            mean += ", beyond →"
        curve = gaussian_kde(loss)(grid)
        axis.plot(grid, curve, color=colour(number), linestyle=line(number), label=mean)
    axis.set_ylim(bottom=0)
    axis.set(
        title=f"{name} ({len(next(iter(values.values())))} samples)",
        xlabel="log-perplexity of a sample, nats a token",
        ylabel="density",
    )
    axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), fontsize=9)
