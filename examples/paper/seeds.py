"""A study over several seeds: each effect or score in each seed, its mean and its spread.

Of the miniature a page with a picture. Every number comes from the files of the runs, and so does every
verdict: an effect appears in a seed if its 95% interval lies on the expected side of no change.

    for seed in 1 2 3; do make study-mini SEED=$seed; done
    python examples/paper/seeds.py --study runs/study-mini --output-dir docs

Of any other study the scores, as Markdown on standard output, from a folder a seed with files of
`tools/evaluate.py`:

    python examples/paper/seeds.py --folders scores/seed-1 scores/seed-2 scores/seed-3 --before synth
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402

from examples.paper.seed_scores import (  # noqa: E402
    read_folder,
    read_folders,
    score_page,
    score_rows,
    spread,
)
from megatron_ext.analysis.figures import colour, marker, render  # noqa: E402
from megatron_ext.analysis.perplexity_report import compare  # noqa: E402
from megatron_ext.analysis.scores import Score  # noqa: E402
from megatron_ext.data.atomic import AtomicFiles  # noqa: E402
from megatron_ext.exceptions import ConfigError, DataError, flag_name  # noqa: E402
from tools.common import run_tool  # noqa: E402

if TYPE_CHECKING:
    from matplotlib.axes import Axes

ASCENT = "unlearn_lm_ga"
SETS = ("real", "synthetic", "instruction")
TASKS = {
    "demo_instructions": "instructions followed",
    "demo_sums": "sums",
    "demo_definitions": "definitions, new",
    "demo_definitions_seen": "definitions, seen",
}

INTRODUCTION = """# The study in miniature

Nine models of 3.3 M parameters, a chat model of each, trained, evaluated and compared on a 2-core CPU by
`make study-mini`, in {count} runs with different seeds (the seed draws the first weights and orders the data;
the data are the same). Text is that of the installed Python and what [`examples/demo`](../examples/demo)
makes of it. `examples/paper/seeds.py` wrote this page from the files of the runs.

The models are 600 times smaller than the paper's, and their text 500,000 times. This page says which of the
paper's effects such a small model shows; it is no evidence about models of 2 B parameters.

A change *appears* in a seed if its whole 95% interval (bootstrap over at most 400 samples of text; normal
over a task's questions) lies on the side that the paper leads one to expect; "(no)" marks the other seeds.
"a - b" is a difference of mean log-perplexities (nats a token) or of scores (percentage points), "a / b" a
ratio of variances.
"""


@dataclass(frozen=True)
class Seed:
    """What one run of the study measured.

    Attributes:
        number: its seed.
        losses: by model and set, log-perplexity of each sample, nats a token, fp64 `[n]`.
        scores: by model (`X_chat` is its chat model) and task.
    """

    number: int
    losses: dict[str, dict[str, np.ndarray]]
    scores: dict[str, dict[str, Score]]


@dataclass(frozen=True)
class Effect:
    """A change from one model to another that the study may show.

    Attributes:
        after: the model that changed.
        before: the model that it is compared with.
        of: a set of text, or a task.
        sign: the expected side of no change.
        variance: compare variances instead of means.
    """

    after: str
    before: str
    of: str
    sign: int
    variance: bool = False

    def measure(self, seed: Seed) -> tuple[float, bool]:
        """The change in a seed, and whether its interval lies on the expected side of no change.

        Points of percent for a task; nats a token for the mean of a set, the ratio for its variance.
        """
        if self.of in TASKS:
            after, before = (seed.scores[model][self.of] for model in (self.after, self.before))
            change = after.value - before.value
            return change, self.sign * change > 1.96 * math.hypot(
                after.error or 0, before.error or 0
            )
        found = compare(seed.losses[self.after][self.of], seed.losses[self.before][self.of])
        change = found["variance_ratio" if self.variance else "shift"]
        none = 1.0 if self.variance else 0.0
        sides = (self.sign * (change[end] - none) for end in ("low", "high"))
        return change["value"], min(sides) > 0

    def name(self) -> str:
        """In words and signs."""
        joined = f"{self.after} {'/' if self.variance else '-'} {self.before}"
        return f"{joined}, {TASKS.get(self.of, self.of)}{', variance' if self.variance else ''}"

    def row(self, seeds: Sequence[Seed]) -> str:
        """Of the table."""
        found = [self.measure(seed) for seed in seeds]
        form = ".2f" if self.variance else "+.1f" if self.of in TASKS else "+.2f"
        cells = [
            self.name(),
            f"{'below' if self.sign < 0 else 'above'} {1 if self.variance else 0}",
            *(f"{value:{form}}{'' if seen else ' (no)'}" for value, seen in found),
            spread([value for value, _ in found], form),
            f"{sum(seen for _, seen in found)} of {len(found)}",
        ]
        return f"| {' | '.join(cells)} |"


QUESTIONS = {
    "Does synthetic training shift and narrow the perplexity of instruction text?": [
        Effect("synth_lm", "base_lm", "instruction", -1),
        Effect("synth_lm", "base_lm", "instruction", -1, variance=True),
        # Real text alone, as many tokens: what further training does by itself.
        Effect("mix_synth_lm", "non_synth_lm", "instruction", -1),
        Effect("mix_synth_lm", "non_synth_lm", "instruction", -1, variance=True),
    ],
    "Does unlearning move it back, and forget?": [
        Effect("unlearn_lm", "synth_lm", "instruction", 1),
        Effect("unlearn_lm", "synth_lm", "instruction", 1, variance=True),
        Effect("unlearn_lm", "synth_lm", "synthetic", 1),
        Effect("unlearn_lm_u33b", "synth_lm_u33b", "instruction", 1),
    ],
    "Does gradient ascent at the same weight damage the model?": [
        Effect("unlearn_lm_ga", "synth_lm", "real", 1),
        Effect("unlearn_lm_ga", "unlearn_lm", "real", 1),
        Effect("unlearn_lm", "synth_lm", "real", -1),
    ],
    "Does RefineLM repair less, at more tokens?": [
        Effect("refine_lm", "synth_lm", "instruction", 1),
        Effect("unlearn_lm", "refine_lm", "instruction", 1),
        Effect("unlearn_lm", "refine_lm", "synthetic", 1),
    ],
    "What happens to instruction following and synthetic knowledge of the chat models?": [
        Effect("synth_lm_chat", "base_lm_chat", "demo_instructions", -1),
        Effect("unlearn_lm_chat", "synth_lm_chat", "demo_instructions", 1),
        Effect("refine_lm_chat", "synth_lm_chat", "demo_instructions", 1),
        Effect("unlearn_lm_ga_chat", "synth_lm_chat", "demo_instructions", -1),
        Effect("synth_lm_chat", "base_lm_chat", "demo_sums", 1),
        Effect("unlearn_lm_chat", "synth_lm_chat", "demo_sums", -1),
    ],
}


def read_seed(directory: Path) -> Seed:
    """Read the files of one run.

    Raises:
        DataError: the run has not come to its end.
    """
    if not (directory / "done" / "report").exists():
        raise DataError(f"{directory}: expected a finished run of the study, found no report")
    report = json.loads((directory / "perplexity.json").read_text())
    losses = {
        model["label"]: {name: np.array(found["loss"]) for name, found in model["sets"].items()}
        for model in report["models"].values()
    }
    scores = read_folder(directory).scores
    return Seed(int(directory.name.removeprefix("seed-")), losses, scores)


def perplexity_rows(seeds: Sequence[Seed]) -> list[str]:
    """A table of mean and variance of the log-perplexity, a row a model."""
    heads = [f"{name}{part}" for name in SETS for part in ("", ", variance")]
    rows = [f"| model | {' | '.join(heads)} |", "|---" * (len(heads) + 1) + "|"]
    for model in seeds[0].losses:
        cells = []
        for name in SETS:
            values = [seed.losses[model][name] for seed in seeds]
            cells.append(spread([float(v.mean()) for v in values], ".2f"))
            cells.append(spread([float(v.var(ddof=1)) for v in values], ".2f"))
        rows.append(f"| {model} | {' | '.join(cells)} |")
    return rows


def summary(seeds: Sequence[Seed]) -> list[str]:
    """Which changes appear in all seeds, in some, in none."""
    groups: dict[str, list[str]] = {"every seed": [], "some seeds": [], "no seed": []}
    for effects in QUESTIONS.values():
        for effect in effects:
            count = sum(effect.measure(seed)[1] for seed in seeds)
            where = (
                "no seed" if not count else "every seed" if count == len(seeds) else "some seeds"
            )
            limit = f"{'<' if effect.sign < 0 else '>'} {1 if effect.variance else 0}"
            groups[where].append(f"{effect.name()} {limit}")
    return [f"- **In {where}**: {'; '.join(names) or 'none'}." for where, names in groups.items()]


def page(seeds: Sequence[Seed]) -> str:
    """All of it as Markdown."""
    lines = [INTRODUCTION.format(count=len(seeds)), "![shifts of perplexity](miniature.png)", ""]
    expected = "Of the changes that the paper leads one to expect, these appear:"
    lines += [expected, "", *summary(seeds), ""]
    for question, effects in QUESTIONS.items():
        numbers = (f"seed {seed.number}" for seed in seeds)
        heads = ["change", "expected", *numbers, "mean ± deviation", "appears in"]
        lines += [f"## {question}", "", f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
        lines += [*(effect.row(seeds) for effect in effects), ""]
    lines += ["## Log-perplexity", "", "Nats a token, over samples; ± over seeds.", ""]
    lines += [*perplexity_rows(seeds), "", "## Scores", "", "Percent right; ± over seeds.", ""]
    return "\n".join([*lines, *score_rows([seed.scores for seed in seeds], TASKS), ""])


def panel(axis: Axes, seeds: Sequence[Seed], name: str) -> None:
    """Shift of every model's log-perplexity of a set from BaseLM, a mark a seed."""
    means = {
        model: np.array([seed.losses[model][name].mean() for seed in seeds])
        for model in seeds[0].losses
    }
    base = means.pop("base_lm")
    shifts = {model: mean - base for model, mean in means.items()}
    # Where gradient ascent ends there is no scale: it is drawn at the edge.
    reach = 1.2 * max(abs(values).max() for model, values in shifts.items() if model != ASCENT)
    for row, values in enumerate(shifts.values()):
        shown = np.clip(values, -reach, reach)
        axis.plot(shown, [row] * len(seeds), marker(row), color=colour(row), alpha=0.7)
        if abs(values).max() > reach:
            axis.text(reach, row - 0.2, f"{fmean(values):+.1f} →", ha="right", va="bottom")
    axis.axvline(0, color="0.6", linewidth=0.8)
    axis.set(
        title=name, xlabel="shift from base_lm, nats a token", xlim=(-1.1 * reach, 1.1 * reach)
    )
    axis.set_yticks(range(len(shifts)), list(shifts))
    axis.invert_yaxis()


def main() -> None:
    """Read, compare, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    inputs = parser.add_mutually_exclusive_group(required=True)
    inputs.add_argument("--study", type=Path, help="folder with seed-1, seed-2, ... of study-mini")
    inputs.add_argument("--folders", type=Path, nargs="+", help="with scores, one a seed")
    parser.add_argument(
        "--output-dir",
        type=Path,
        help="with --study, for miniature.md and miniature.png; overwritten",
    )
    parser.add_argument("--before", help="with --folders: list the changes from this model")
    options = parser.parse_args()
    name = "output_dir" if options.folders else "before"
    if getattr(options, name) is not None:
        beside = "--study" if options.folders else "--folders"
        raise ConfigError(f"{flag_name(name)}: expected it beside {beside} alone")
    if options.folders:
        print(score_page(read_folders(options.folders), options.before), end="")
        return
    if options.output_dir is None:
        raise ConfigError("--output-dir: expected a folder beside --study, found none")
    seeds = [read_seed(directory) for directory in sorted(options.study.glob("seed-*"))]
    if not seeds:
        raise DataError(f"{options.study}: expected folders seed-1, seed-2, ..., found none")
    picture, text = options.output_dir / "miniature.png", options.output_dir / "miniature.md"
    with AtomicFiles([picture, text], overwrite=True) as files:
        panels = [partial(panel, seeds=seeds, name=name) for name in SETS]
        files[picture].write(render(panels, size=(4.4, 3.6)))
        files[text].write(page(seeds).encode())
        files.commit()
    print(text)


if __name__ == "__main__":
    run_tool(main)
