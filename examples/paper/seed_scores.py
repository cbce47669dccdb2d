"""Scores of the same models under several seeds: read from a folder a seed, joined in tables.

A folder holds files of `tools/evaluate.py`: the harness's under any name, FollowBench's and MT-Bench's as the
verbs name them. Other files beside them, such as those of `tools/analyze.py`, are passed over.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from megatron_ext.analysis.scores import Score, read_scores, with_average
from megatron_ext.exceptions import ConfigError, DataError

Scores = Mapping[str, Mapping[str, Score]]


@dataclass(frozen=True)
class Folder:
    """The scores of a seed.

    Attributes:
        name: the folder's.
        scores: by model and benchmark.
        judges: by benchmark, the model that judged.
    """

    name: str
    scores: dict[str, dict[str, Score]] = field(default_factory=dict)
    judges: dict[str, str] = field(default_factory=dict)


def read_folder(directory: Path, *, name: str = "") -> Folder:
    """Read every file of scores in a folder.

    Args:
        directory: the folder; not what is below it.
        name: of the seed; by default the folder's.

    Raises:
        DataError: there is no score, a file is broken, a benchmark is there twice for a model, or two judges
            were asked.
    """
    folder = Folder(name or directory.name)
    for path in sorted(directory.glob("*.json")):
        try:
            content = json.loads(path.read_bytes())
        except ValueError as error:
            raise DataError(f"{path}: expected a JSON file, found {error}") from error
        if not isinstance(content, dict) or not {"results", "benchmark"} & content.keys():
            continue
        found = read_scores(content, name=str(path))
        known = folder.scores.setdefault(_model(content, path), {})
        if twice := sorted(known.keys() & found.keys()):
            raise DataError(
                f"{path}: expected benchmarks without a score yet, found {twice[0]} again"
            )
        known.update(found)
        if "judge" in content:
            judge = str(content["judge"]["model"])
            for benchmark in found:
                if folder.judges.setdefault(benchmark, judge) != judge:
                    raise DataError(
                        f"{path}: expected {folder.judges[benchmark]} as the judge of {benchmark}, as of "
                        f"the other models, found {judge}"
                    )
    if not folder.scores:
        raise DataError(f"{directory}: expected files of `evaluate.py` (*.json), found none")
    return folder


def read_folders(directories: Sequence[Path]) -> list[Folder]:
    """Read a folder a seed.

    Raises:
        ConfigError: a folder is named twice.
        DataError: as from :func:`read_folder`, or the seeds were judged by different models.
    """
    if len({path.resolve() for path in directories}) < len(directories):
        raise ConfigError("--folders: expected a folder a seed, found one twice")
    alike = len({path.name for path in directories}) < len(directories)
    folders = [read_folder(path, name=str(path) if alike else "") for path in directories]
    judges: dict[str, str] = {}
    for folder in folders:
        for benchmark, judge in folder.judges.items():
            if judges.setdefault(benchmark, judge) != judge:
                raise DataError(
                    f"{folder.name}: expected {judges[benchmark]} as the judge of {benchmark}, as in the "
                    f"other folders, found {judge}"
                )
    return folders


def _model(content: Mapping[str, Any], path: Path) -> str:
    """The name that the model was given, or that of the file."""
    settings = content.get("settings")
    named = content.get("model") or (settings or {}).get("name")
    return named if isinstance(named, str) else path.stem.removeprefix("scores_")


def spread(values: Sequence[float], form: str) -> str:
    """Mean and standard deviation over seeds."""
    if len(values) < 2:
        return f"{values[0]:{form}}"
    return f"{fmean(values):{form}} ± {stdev(values):{form.lstrip('+')}}"


def score_rows(seeds: Sequence[Scores], labels: Mapping[str, str]) -> list[str]:
    """A table of scores over seeds, a row a model, chat models last.

    Args:
        seeds: scores of each seed by model and benchmark.
        labels: of the first columns, by benchmark; other benchmarks follow under their own names.
    """
    benchmarks = dict(labels)
    for scores in (found for seed in seeds for found in seed.values()):
        benchmarks |= {name: name for name in with_average(scores) if name not in benchmarks}
    rows = [f"| model | {' | '.join(benchmarks.values())} |", "|---" * (len(benchmarks) + 1) + "|"]
    models = {model for seed in seeds for model in seed}
    for model in sorted(models, key=lambda name: (name.endswith("_chat"), name)):
        cells = [_cell(_values(seeds, model, name), len(seeds), _form(name)) for name in benchmarks]
        rows.append(f"| {model} | {' | '.join(cells)} |")
    return rows


def change_rows(folders: Sequence[Folder], before: str) -> list[str]:
    """A table of what changed from a model to each of the others, in each seed.

    Raises:
        ConfigError: no folder has the model.
    """
    known = sorted({model for folder in folders for model in folder.scores})
    if before not in known:
        raise ConfigError(f"--before: expected one of {', '.join(known)}, found {before}")
    names = [folder.name for folder in folders]
    heads = ["change", *names, "mean ± deviation", "above 0 in"]
    rows = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for model in known:
        benchmarks = dict.fromkeys(
            name for folder in folders for name in with_average(folder.scores.get(model, {}))
        )
        for benchmark in benchmarks if model != before else ():
            found = [_change(folder.scores, before, model, benchmark) for folder in folders]
            changes = [change for change in found if change is not None]
            if not changes:
                continue
            form = f"+{_form(benchmark)}"
            cells = ["" if change is None else f"{change:{form}}" for change in found]
            risen = f"{sum(change > 0 for change in changes)} of {len(changes)}"
            ends = (_cell(changes, len(folders), form), risen)
            rows.append(f"| {model} - {before}, {benchmark} | {' | '.join((*cells, *ends))} |")
    return rows


def score_page(folders: Sequence[Folder], before: str | None) -> str:
    """Both tables as Markdown, and how many verdicts are in no score."""
    names = ", ".join(folder.name for folder in folders)
    lines = [
        f"# Scores over {len(folders)} seeds",
        "",
        f"{names}. Mean ± standard deviation over them, in",
    ]
    lines += ["percent; MT-Bench from 1 to 10; a metric that is named, in its own unit.", ""]
    lines += score_rows([folder.scores for folder in folders], {})
    if before is not None:
        lines += ["", f"## Changes from {before}", "", *change_rows(folders, before)]
    unread = [
        f"- {folder.name}, {model}, {benchmark}: {score.unparsable} verdicts could not be read"
        for folder in folders
        for model, scores in folder.scores.items()
        for benchmark, score in scores.items()
        if score.unparsable
    ]
    return "\n".join([*lines, "", *unread, *([""] if unread else [])])


def _values(seeds: Sequence[Scores], model: str, benchmark: str) -> list[float]:
    found = [with_average(seed.get(model, {})) for seed in seeds]
    return [scores[benchmark].value for scores in found if benchmark in scores]


def _change(scores: Scores, before: str, model: str, benchmark: str) -> float | None:
    values = [_values([scores], name, benchmark) for name in (before, model)]
    return values[1][0] - values[0][0] if all(values) else None


def _form(benchmark: str) -> str:
    return ".2f" if benchmark == "MT-Bench" else ".1f"


def _cell(values: Sequence[float], seeds: int, form: str) -> str:
    if not values:
        return ""
    return spread(values, form) + ("" if len(values) == seeds else f" ({len(values)} of {seeds})")
