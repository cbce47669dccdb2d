"""Benchmark scores out of the JSON files that `tools/evaluate.py` writes, and the paper's beside them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from megatron_ext.evaluation import paper
from megatron_ext.evaluation.errors import error_of_mean
from megatron_ext.exceptions import DataError

KNOWLEDGE = tuple(paper.BENCHMARKS)
AVERAGE = "average"
CHAT = ("FollowBench SSR", "FollowBench HSR", "MT-Bench")

# The paper's names by the harness's.
_NAMES = {task: column for column, (task, _) in paper.BENCHMARKS.items()}
# Their parts, such as mmlu_anatomy, are in their own scores; so told in files that do not say what is a part.
_GROUPS = tuple(f"{name}_" for name in ("mmlu", "cmmlu", "ceval-valid"))
# What is taken of a task that has several metrics; otherwise its first.
_METRICS = ("acc", "exact_match", "pass@1", "pass_at_1", "prompt_level_strict_acc")


@dataclass(frozen=True)
class Score:
    """A score of a model.

    Attributes:
        value: in percent; MT-Bench's from 1 to 10.
        error: its standard error in the same unit; ``None`` if unknown.
        unparsable: verdicts of the judge that could not be read and are not in the value.
    """

    value: float
    error: float | None = None
    unparsable: int = 0


def read_scores(content: Any, *, name: str) -> dict[str, Score]:
    """Scores by benchmark.

    Args:
        content: what a verb of `tools/evaluate.py` wrote: the harness's ``results`` with metrics between 0
            and 1, FollowBench's ``summary`` or MT-Bench's ``scores``.
        name: the file, for messages.

    Raises:
        DataError: the file has another form, or no score in it.
    """
    try:
        scores = _read(content)
    except (AttributeError, KeyError, TypeError) as error:
        raise DataError(
            f"{name}: expected a file of `evaluate.py`, found another: {error}"
        ) from error
    if not scores:
        raise DataError(f"{name}: expected the score of a task, found none")
    return scores


def _read(content: Any) -> dict[str, Score]:
    benchmark = content.get("benchmark")
    if benchmark == "followbench":
        summary = content["summary"]
        unparsable = summary["unparsable"]
        found = {f"FollowBench {rate.upper()}": summary[rate] for rate in ("ssr", "hsr")}
    elif benchmark == "mt-bench":
        total = content["scores"]["all"]
        unparsable = total["unparsable"]
        found = {"MT-Bench": total}
    else:
        tasks = content["results"]
        parts = _parts(tasks, content.get("group_subtasks"))
        scores = {
            _NAMES.get(task, task): _task_score(metrics)
            for task, metrics in tasks.items()
            if task not in parts
        }
        return {task: score for task, score in scores.items() if score is not None}
    return {  # files that were written before errors were have none
        column: Score(rated["mean"], rated.get("error"), unparsable)
        for column, rated in found.items()
        if rated["mean"] is not None
    }


def _parts(
    tasks: Mapping[str, Any], children: Mapping[str, Sequence[str]] | None
) -> frozenset[str]:
    """Tasks that are in the score of a group."""
    if children is None:
        return frozenset(task for task in tasks if task.startswith(_GROUPS))
    scored = (group for group in children if _task_score(tasks.get(group, {})) is not None)
    return frozenset(task for group in scored for task in children[group])


def _task_score(found: Mapping[str, Any]) -> Score | None:
    """One metric of a task, in percent; ``None`` if it has none."""
    metrics = {key: value for key, value in found.items() if _is_number(value) and "," in key}
    metrics = {key: value for key, value in metrics.items() if "_stderr," not in key}
    if not metrics:
        return None
    # Of several filters of one metric the first.
    by_name = {key.partition(",")[0]: key for key in reversed(metrics)}
    chosen = next((by_name[m] for m in _METRICS if m in by_name), next(iter(metrics)))
    metric, _, variant = chosen.partition(",")
    error: Any = found.get(f"{metric}_stderr,{variant}")
    return Score(100 * metrics[chosen], 100 * error if _is_number(error) else None)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def with_average(scores: Mapping[str, Score]) -> dict[str, Score]:
    """The scores, with the mean of the paper's six benchmarks if all six are there; they are independent."""
    found = [scores[benchmark] for benchmark in KNOWLEDGE if benchmark in scores]
    if len(found) < len(KNOWLEDGE):
        return dict(scores)
    average = Score(fmean(s.value for s in found), error_of_mean(s.error for s in found))
    return {**scores, AVERAGE: average}


def paper_scores() -> dict[str, dict[str, Score]]:
    """The paper's scores by model and benchmark, averages included."""
    columns = ((KNOWLEDGE, paper.BASE), (CHAT, paper.CHAT))
    return {
        model: with_average(dict(zip(names, map(Score, values), strict=True)))
        for names, models in columns
        for model, values in models.items()
    }
