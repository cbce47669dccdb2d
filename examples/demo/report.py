"""What the demo ends with: a table, two plots, and whether the paper's pattern was seen."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from examples.demo.stages import Settings
from megatron_ext.analysis.scalars import read_scalars

MODELS = {
    "base": "BaseLM",
    "synth": "SynthLM",
    "unlearn": "UnlearnLM",
    "unlearn-ga": "UnlearnLM (GA)",
}
SETS = ("real", "synthetic", "instruction")


def write_report(out: Path, settings: Settings) -> str:
    """Draw the losses and say what was measured; perplexity.png is the analysis tool's.

    Args:
        out: the demo's folder, all stages finished.
        settings: what it ran with.

    Returns:
        The text to print.
    """
    report = json.loads((out / "perplexity.json").read_text())
    models = {Path(path).name: model["sets"] for path, model in report["models"].items()}
    plot_losses(out)
    lines = [
        "",
        f"Perplexity of held-out samples, first {settings.sequence_length} tokens of each: over all tokens,",
        "and mean ± standard deviation of the samples' log-perplexity; mean p: of the synthetic tokens.",
        "",
        *table(models),
        "",
        *verdict(models, factor=1.5 if settings.model else 3),
        "",
        *answers(out),
        f"curves:      {out / 'losses.png'}, {out / 'perplexity.png'}",
        f"losses:      {out / 'tensorboard'} (TensorBoard)",
        f"checkpoints: {', '.join(str(out / name) for name in MODELS)}",
    ]
    text = "\n".join(lines)
    (out / "report.txt").write_text(text + "\n")
    return text


def table(models: dict[str, Any]) -> list[str]:
    """One row a model."""
    header = f"{'':15}" + "".join(f"{name + ' text':>26}" for name in SETS) + f"{'mean p':>9}"
    rows = [header, "-" * len(header)]
    for name, title in MODELS.items():
        cells = []
        for text_set in SETS:
            scores = models[name][text_set]
            loss = np.array(scores["loss"])
            cells.append(
                f"{_short(scores['corpus_perplexity'])} ({loss.mean():.2f} ± {loss.std():.2f})"
            )
        rows.append(
            f"{title:15}"
            + "".join(f"{cell:>26}" for cell in cells)
            + f"{mean_probability(models[name]):9.4f}"
        )
    return rows


def verdict(models: dict[str, Any], *, factor: float) -> list[str]:
    """Whether each part of the pattern shows in these measurements.

    Args:
        models: scores of each model by set.
        factor: by which the perplexity of the pairs must fall and rise again. One who has read the web finds
            them likely before, so that it can fall by less than in a model that is trained here.
    """

    def perplexity(model: str, text_set: str) -> float:
        return float(models[model][text_set]["corpus_perplexity"])

    base, synth, unlearn, ascent = MODELS
    real_change = perplexity(unlearn, "real") / perplexity(synth, "real") - 1
    ascent_change = perplexity(ascent, "real") / perplexity(synth, "real") - 1
    checks = [
        (
            "training on the pairs makes them predictable",
            perplexity(synth, "synthetic") < perplexity(base, "synthetic") / factor,
            f"{_short(perplexity(base, 'synthetic'))} -> {_short(perplexity(synth, 'synthetic'))}",
        ),
        (
            "unlearning takes that back",
            perplexity(unlearn, "synthetic") > factor * perplexity(synth, "synthetic"),
            f"{_short(perplexity(synth, 'synthetic'))} -> {_short(perplexity(unlearn, 'synthetic'))}",
        ),
        (
            "and costs real text less than 5%",
            real_change < 0.05,
            f"{perplexity(synth, 'real'):.1f} -> {perplexity(unlearn, 'real'):.1f} ({real_change:+.1%})",
        ),
        (
            "gradient ascent runs away on the pairs",
            perplexity(ascent, "synthetic") > 100 * perplexity(unlearn, "synthetic"),
            f"{_short(perplexity(unlearn, 'synthetic'))} bounded, "
            f"{_short(perplexity(ascent, 'synthetic'))} with ascent",
        ),
        (
            "and costs more real text than the bounded loss",
            ascent_change > max(real_change, 0) + 0.01,
            f"{real_change:+.1%} bounded, {ascent_change:+.1%} with ascent",
        ),
    ]
    lines = [
        f"{'seen    ' if ok else 'NOT SEEN'}  {claim}: {values}" for claim, ok, values in checks
    ]
    if not all(ok for _, ok, _ in checks):
        lines.append(
            "Part of the paper's pattern does not show in this run; the numbers above are as measured."
        )
    return lines


def answers(out: Path) -> list[str]:
    """What each model says to each prompt, a line each; nothing where no model was asked."""
    said = {}
    for name, title in MODELS.items():
        path = out / "answers" / f"{name}.jsonl"
        if not path.is_file():
            return []
        said[title] = [json.loads(line) for line in path.read_text().splitlines()]
    lines = []
    for records in zip(*said.values(), strict=True):
        prompt = records[0].get("prompt") or f"User: {records[0]['messages'][-1]['content']}"
        lines += [f"> {_one_line(prompt)}"]
        lines += [
            f"{title:15} {_one_line(record['completion'])}"
            for title, record in zip(said, records, strict=True)
        ]
        lines += [""]
    return lines


def _one_line(text: str, width: int = 92) -> str:
    text = " \\ ".join(line.strip() for line in text.strip().splitlines() if line.strip())
    return text if len(text) <= width else f"{text[: width - 3]}..."


def mean_probability(sets: dict[str, Any]) -> float:
    """Mean probability of the synthetic tokens under a model."""
    scores = sets["synthetic"]
    return float(np.average(scores["probability"], weights=scores["tokens"]))


def _short(value: float) -> str:
    return f"{value:.1f}" if value < 1e4 else f"{value:.1e}"


def plot_losses(out: Path) -> None:
    """Training losses of BaseLM and SynthLM, and the terms of both unlearning runs."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    trained = [name for name in MODELS if (out / "tensorboard" / name).is_dir()]  # an import is not
    runs = {name: read_scalars(out / "tensorboard" / name) for name in trained}
    figure, axes = plt.subplots(1, 4, figsize=(15, 3.4), layout="constrained")
    for name in (name for name in ("base", "synth") if name in runs):
        axes[0].plot(*_curve(runs[name]["lm loss"]), label=MODELS[name])
    axes[0].set(title="training", ylabel="cross-entropy, nats a token")
    for axis, tag, ylabel in (
        (axes[1], "forget token probability", "mean p of forgotten tokens"),
        (axes[2], "replay loss", "cross-entropy of replayed text"),
        (axes[3], "mitigation kl", "KL(reference || model)"),
    ):
        for name, style in (("unlearn", "-"), ("unlearn-ga", "--")):
            axis.plot(*_curve(runs[name][tag]), style, label=MODELS[name])
        axis.set(title=tag, ylabel=ylabel)
    for axis in axes:
        axis.set_xlabel("step")
        axis.legend()
        axis.grid(alpha=0.3)
    figure.savefig(out / "losses.png", dpi=120)
    plt.close(figure)


def _curve(values: dict[int, float]) -> tuple[list[int], list[float]]:
    """Steps and values; a resumed run may have written a step again."""
    steps = sorted(values)
    return steps, [values[step] for step in steps]
