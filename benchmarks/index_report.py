"""What `benchmarks.index` measured: fitted, extrapolated, as a table and as a plot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

GOAL = (10**12, 1000)  # tokens and shards that are extrapolated to
KINDS = ("ours", "Megatron-Core")


def terms(case: dict[str, Any]) -> dict[str, list[float]]:
    """By quantity, what it is proportional to: the columns of its fit."""
    shards, documents, samples = case["shards"], case["documents"], case["samples"]
    names = ("datasets_s", "load_s", "cache_mb", "peak_mib", "held_mib", "others_mib")
    columns = {name: [shards, documents] for name in names}
    return columns | {"blending_s": [samples, samples * shards]}


def quantities(found: dict[str, Any]) -> dict[str, float]:
    """Of one kind at one size, what is fitted."""
    build = found["build"]
    return {
        "datasets_s": build["processor_s"] - build["blending_processor_s"],
        "blending_s": build["blending_processor_s"],
        "load_s": found["load"]["processor_s"],
        "cache_mb": found["cache_mb"],
        "peak_mib": build["peak_mib"],
        "held_mib": build["held_mib"],
        "others_mib": found["load"]["held_mib"],
    }


def fit(cases: list[dict[str, Any]], kind: str) -> dict[str, dict[str, Any]]:
    """Least squares of each quantity, relative to what was measured, and its value at the goal."""
    last = max(cases, key=lambda case: case["documents"])
    scale = GOAL[0] / last["tokens"]
    goal = {"shards": GOAL[1]} | {n: last[n] * scale for n in ("documents", "samples")}
    result = {}
    for name, columns in terms(goal).items():
        rows = np.array([terms(case)[name] for case in cases], dtype=float)
        measured = np.array([quantities(case[kind])[name] for case in cases])
        weight = 1 / np.maximum(measured, 1e-9)
        factors = non_negative(rows * weight[:, None], measured * weight)
        result[name] = {
            "coefficients": factors.tolist(),
            "measured": measured.tolist(),
            "fitted": (rows @ factors).tolist(),
            "goal": float(np.dot(columns, factors)),
        }
    return result


def non_negative(rows: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Least squares; a column whose factor would be negative is left out."""
    kept = list(range(rows.shape[1]))
    factors = np.zeros(rows.shape[1])
    while kept:
        scale = np.linalg.norm(rows[:, kept], axis=0)
        found = np.linalg.lstsq(rows[:, kept] / scale, values, rcond=None)[0] / scale
        if (found >= 0).all():
            factors[kept] = found
            break
        kept.pop(int(np.argmin(found * scale)))
    return factors


def table(cases: list[dict[str, Any]], fits: dict[str, Any]) -> str:
    """All sizes and the extrapolation."""
    head = f"{'tokens':>8}{'shards':>8}  {'':14}{'build s':>10}{'of it blend':>13}{'load s':>9}"
    lines = [f"{head}{'cache MB':>11}{'peak MiB':>11}{'held MiB':>11}{'others MiB':>12}"]

    def row(tokens, shards, kind, q):
        build = q["datasets_s"] + q["blending_s"]
        return (
            f"{tokens:>8.0e}{shards:>8}  {kind:14}{build:>10.1f}{q['blending_s']:>13.1f}"
            f"{q['load_s']:>9.2f}{q['cache_mb']:>11.1f}{q['peak_mib']:>11.0f}{q['held_mib']:>11.0f}"
            f"{q['others_mib']:>12.0f}"
        )

    for case in cases:
        lines += [row(case["tokens"], case["shards"], k, quantities(case[k])) for k in KINDS]
    for kind in KINDS:
        goal = {name: one["goal"] for name, one in fits[kind].items()}
        lines.append(row(*GOAL, kind, goal) + "  by the fit")
    return "\n".join(lines)


def draw(cases: list[dict[str, Any]], fits: dict[str, Any], path: Path) -> None:
    """Measured and fitted seconds and memory over tokens."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 3, figsize=(13, 4))
    panels = (("datasets_s", "blending_s"), ("load_s",), ("peak_mib",))
    titles = ("first start, processor seconds", "with the cache, processor seconds", "peak MiB")
    for axis, names, title in zip(axes, panels, titles, strict=True):
        for kind, colour in zip(KINDS, ("tab:blue", "tab:orange"), strict=True):
            for shards, mark in zip(sorted({c["shards"] for c in cases}), "ov^", strict=False):
                mine = [case for case in cases if case["shards"] == shards]
                measured = [quantities(case[kind]) for case in mine]
                seen = [sum(one[name] for name in names) for one in measured]
                tokens = [case["tokens"] for case in mine]
                axis.plot(tokens, seen, mark, color=colour, label=f"{kind}, {shards} shards")
                tokens = np.geomspace(min(tokens), GOAL[0], 50)
                per_token = {n: cases[0][n] / cases[0]["tokens"] for n in ("documents", "samples")}
                columns = terms({"shards": shards} | {n: x * tokens for n, x in per_token.items()})
                fitted = [
                    factor * column
                    for name in names
                    for factor, column in zip(
                        fits[kind][name]["coefficients"], columns[name], strict=True
                    )
                ]
                axis.plot(tokens, sum(fitted) * np.ones(50), "--", color=colour, linewidth=1)
        axis.set(xscale="log", yscale="log", xlabel="tokens", title=title)
    axes[0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
