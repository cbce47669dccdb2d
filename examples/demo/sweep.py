#!/usr/bin/env python
"""How far to unlearn: weights, losses and lengths compared, from the demo's SynthLM on.

    make demo
    python examples/demo/sweep.py --demo-dir runs/demo --output-dir runs/sweep

trains a model for each setting, scores all of them on held-out text, and writes table.md and sweep.png. A
second call goes on where the first was stopped. `docs/choosing.md` shows what comes out.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from examples.demo.report import mean_probability  # noqa: E402
from examples.demo.run import add_size_options, chosen_settings, run_stage  # noqa: E402
from examples.demo.stages import PRESETS, Stage, choose_device, stages  # noqa: E402
from megatron_ext.analysis.scalars import read_scalars  # noqa: E402

TABLE_HEAD = """\
| run | weight | p, synthetic | synthetic | real - SynthLM | instruction - SynthLM | KL at the end |
|---|---|---|---|---|---|---|
"""


@dataclass(frozen=True)
class Series:
    """Runs that differ in the weight of forgetting alone."""

    name: str
    title: str
    weights: tuple[float, ...]
    flags: tuple[str, ...] = ()
    length: int = 1  # times the demo's steps

    def runs(self) -> dict[str, float]:
        """Names of the runs, and their weights."""
        return {f"{self.name}-{weight:g}": weight for weight in self.weights}


SERIES = (
    Series("bounded", "bounded", (0, 0.01, 0.03, 0.1, 0.3, 1)),
    Series("long", "bounded, 4 times the steps", (0.01, 0.03, 0.1), length=4),
    Series("no-kl", "bounded, no KL", (0.1, 0.3, 1), ("--mitigation-weight", "0")),
    Series("no-replay", "bounded, no replay", (0.1, 1), ("--replay-weight", "0")),
    Series(
        "ascent", "gradient ascent", (0.003, 0.01, 0.03, 0.1), ("--forget-loss", "gradient-ascent")
    ),
)


def main() -> None:
    """Train what is missing, score, and write the table and the plot."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--demo-dir", type=Path, default=ROOT / "runs" / "demo")
    parser.add_argument("--output-dir", type=Path, default=ROOT / "runs" / "sweep")
    parser.add_argument(
        "--only", nargs="+", choices=[name for series in SERIES for name in series.runs()]
    )
    add_size_options(parser)
    options = parser.parse_args()
    demo, out = options.demo_dir.resolve(), options.output_dir.resolve()
    settings = chosen_settings(PRESETS["laptop"], parser, options)
    choose_device(settings)
    finished = demo / "finished" / "synth"
    if not finished.is_file():
        sys.exit(f"error: --demo-dir: expected a finished demo (make demo), found none in {demo}")
    plan = {stage.name: stage for stage in stages(demo, settings)}
    series = [_chosen(one, options.only) for one in SERIES]
    names = [name for one in series for name in one.runs()]
    digest = finished.read_text()
    for one in series:
        for name, weight in one.runs().items():
            stage = _training(one, name, weight, plan["unlearn"], out)
            run_stage(stage, out, stage.digest(digest))
    models = [str(demo / "base"), str(demo / "synth"), *(str(out / name) for name in names)]
    scoring = _scoring(plan["perplexity"], models, out / "perplexity.json")
    run_stage(scoring, out, scoring.digest(digest))
    report = json.loads((out / "perplexity.json").read_text())
    sets = {Path(path).name: model["sets"] for path, model in report["models"].items()}
    rows = _table(series, sets, out)
    (out / "table.md").write_text(rows)
    _plot(series, sets, out / "sweep.png")
    print(f"\n{rows}\n{out / 'table.md'}, {out / 'sweep.png'}")


def _chosen(series: Series, only: list[str] | None) -> Series:
    weights = (weight for name, weight in series.runs().items() if only is None or name in only)
    return replace(series, weights=tuple(weights))


def _training(series: Series, name: str, weight: float, like: Stage, out: Path) -> Stage:
    """The demo's own stage with other weights; of a flag that is given twice the later one counts."""
    steps = like.steps * series.length
    own = ["--train-iters", str(steps), "--forget-weight", f"{weight:g}", *series.flags]
    own += ["--load", str(out / name), "--save", str(out / name)]
    own += ["--tensorboard-dir", str(out / "tensorboard" / name)]
    return Stage(name, f"{series.title}, weight {weight:g}", [*like.command, *own], steps)


def _scoring(like: Stage, models: list[str], output: Path) -> Stage:
    """The demo's scoring, of these models."""
    words = like.command
    first, last = words.index("--checkpoint") + 1, words.index("--data")
    command = [*words[:first], *models, *words[last:], "--output", str(output)]
    return Stage("perplexity", f"Perplexity of held-out text under {len(models)} models", command)


def _synthetic(sets: dict[str, Any], name: str) -> float:
    """Mean log-perplexity of the samples of synthetic text."""
    return float(np.mean(sets[name]["synthetic"]["loss"]))


def _change(sets: dict[str, Any], name: str, text: str) -> tuple[float, float]:
    """Mean change of the samples' log-perplexity against SynthLM, and half its 95% interval (normal)."""
    change = np.array(sets[name][text]["loss"]) - np.array(sets["synth"][text]["loss"])
    return float(change.mean()), float(1.96 * change.std(ddof=1) / np.sqrt(len(change)))


def _table(series: list[Series], sets: dict[str, Any], out: Path) -> str:
    rows = [_row(f"*{title}*", "", sets, name, "") for name, title in _MODELS.items()]
    for one in series:
        for name, weight in one.runs().items():
            kl = read_scalars(out / "tensorboard" / name).get("mitigation kl", {})
            last = [kl[step] for step in sorted(kl)[-5:]]
            rows.append(
                _row(one.title, f"{weight:g}", sets, name, f"{np.mean(last):.3f}" if last else "")
            )
    return TABLE_HEAD + "\n".join(rows) + "\n"


_MODELS = {"base": "BaseLM", "synth": "SynthLM"}


def _row(title: str, weight: str, sets: dict[str, Any], name: str, kl: str) -> str:
    changes = [_change(sets, name, text) for text in ("real", "instruction")]
    cells = ["" if name == "synth" else f"{mean:+.3f} ± {half:.3f}" for mean, half in changes]
    p = mean_probability(sets[name])
    return f"| {title} | {weight} | {p:.3f} | {_synthetic(sets, name):.2f} | {cells[0]} | {cells[1]} | {kl} |"


def _plot(series: list[Series], sets: dict[str, Any], path: Path) -> None:
    """What forgetting costs on text of two kinds: a line a series, a point a run, bars of 95%."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(12, 5), layout="constrained")
    for axis, text in zip(axes, ("real", "instruction"), strict=True):
        for one in filter(lambda one: one.weights, series):
            x = [_synthetic(sets, name) for name in one.runs()]
            y, half = zip(*(_change(sets, name, text) for name in one.runs()), strict=True)
            line = axis.errorbar(x, y, yerr=half, marker="o", capsize=2, label=one.title)
            near = {"xytext": (4, 4), "textcoords": "offset points", "fontsize": 8}
            for at, up, weight in zip(x, y, one.weights, strict=True):
                axis.annotate(f"{weight:g}", (at, up), color=line[0].get_color(), **near)
        for (name, title), style in zip(_MODELS.items(), ("--", ":"), strict=True):
            axis.axvline(_synthetic(sets, name), color="grey", linestyle=style, label=title)
        axis.axhline(0, color="grey", linewidth=0.8)
        axis.set(title=f"{text} text", xlabel="log-perplexity of synthetic text, nats a token")
        axis.set_xscale("log")
        axis.set_yscale("symlog", linthresh=0.1)
        axis.set_xticks([2, 3, 5, 10, 20], ["2", "3", "5", "10", "20"], minor=False)
        axis.set_xticks([], minor=True)
        ticks = [-0.1, -0.05, 0, 0.05, 0.1, 0.3, 1, 3]
        axis.set_yticks(ticks, [f"{tick:+g}" if tick else "0" for tick in ticks])
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("change against SynthLM, nats a token")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    figure.savefig(path, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    # A stage that runs must not go on alone.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("\ninterrupted; the same command goes on from here")
