"""Benchmark scores out of the JSON files that `tools/evaluate.py` writes, and the paper's beside them."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

from megatron_ext.evaluation import paper
from megatron_ext.evaluation.errors import error_of_mean
from megatron_ext.exceptions import DataError, flag_name

KNOWLEDGE = tuple(paper.BENCHMARKS)
AVERAGE = "average"
CHAT = ("FollowBench SSR", "FollowBench HSR", "MT-Bench")

# The paper's names by the harness's.
_NAMES = {task: column for column, (task, _) in paper.BENCHMARKS.items()}
# Their parts, such as mmlu_anatomy, are in their own scores; so told in files that do not say what is a part.
_GROUPS = tuple(f"{name}_" for name in ("mmlu", "cmmlu", "ceval-valid"))
# What is taken of a task that has several metrics; otherwise its first.
_METRICS = ("acc", "exact_match", "pass@1", "pass_at_1", "prompt_level_strict_acc")
# Metrics that lie between 0 and 1, the more the better. Others, such as F1, are so in some tasks only.
_RATE = re.compile(r"acc|acc_\w+|\w+_acc|exact_match|em|pass(@|_at_)\d+|followed")
# Of the settings of answers, those that belong to the model; another seed is another draw of the same.
_OF_MODEL = ("model", "model_path", "tokenizer_model", "chat_template", "eos_token_id", "seed")
# Settings of the harness that make a score another one.
_OF_TASK = ("limit", "apply_chat_template", "max_new_tokens")


@dataclass(frozen=True)
class Score:
    """A score of a model.

    Attributes:
        value: rates in percent, MT-Bench's from 1 to 10, other metrics in their own unit.
        error: its standard error in the same unit; ``None`` if unknown.
        unparsable: verdicts of the judge that could not be read and are not in the value.
        higher_is_better: ``None`` if unknown.
        conditions: what it was made under, by flag, the model left out; what was not given is not there.
    """

    value: float
    error: float | None = None
    unparsable: int = 0
    higher_is_better: bool | None = True
    conditions: Mapping[str, Any] = field(default_factory=dict)


def read_scores(content: Any, *, name: str) -> dict[str, Score]:
    """Scores by benchmark.

    Args:
        content: what a verb of `tools/evaluate.py` wrote: the harness's ``results``, FollowBench's
            ``summary`` or MT-Bench's ``scores``. A task of which no rate is known is named with its metric.
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
        return _task_scores(content)
    conditions = _judged_under(content)
    return {  # files that were written before errors were have none
        column: Score(rated["mean"], rated.get("error"), unparsable, conditions=conditions)
        for column, rated in found.items()
        if rated["mean"] is not None
    }


def _judged_under(content: Mapping[str, Any]) -> dict[str, Any]:
    answers, kinds = content.get("answers") or {}, content.get("constraint_types")
    found = {
        "judge_model": (content.get("judge") or {}).get("model"),
        "language": content.get("language"),
        "constraint_types": sorted(kinds) if kinds else None,
    }
    found |= {name: value for name, value in answers.items() if name not in _OF_MODEL}
    return _given(found)


def _given(settings: Mapping[str, Any]) -> dict[str, Any]:
    """By flag what is not at its default of nothing."""
    return {
        flag_name(name): value
        for name, value in settings.items()
        if value is not None and value is not False
    }


def _task_scores(content: Mapping[str, Any]) -> dict[str, Score]:
    """The harness's tasks, groups in place of their parts."""
    tasks = content["results"]
    parts = _parts(tasks, content.get("group_subtasks"))
    directions = content.get("higher_is_better") or {}
    scores = {}
    for task, found in tasks.items():
        key = _chosen(found)
        if key is None or task in parts:
            continue
        metric, _, variant = key.partition(",")
        error = found.get(f"{metric}_stderr,{variant}")
        is_rate = _RATE.fullmatch(metric) is not None
        scale, name = (100 if is_rate else 1), _NAMES.get(task, task)
        scores[name if is_rate else f"{name} ({metric})"] = Score(
            scale * found[key],
            scale * error if _is_number(error) else None,
            higher_is_better=(directions.get(task) or {}).get(metric, True if is_rate else None),
            conditions=_asked_under(content, task),
        )
    return scores


def _asked_under(content: Mapping[str, Any], task: str) -> dict[str, Any]:
    settings = content.get("settings") or {}
    shots = _shots(content, task)
    found = {name: settings.get(name) for name in _OF_TASK}
    found["num_fewshot"] = settings.get("num_fewshot") if shots is None else shots
    version = (content.get("versions") or {}).get(task)
    return _given(found) | ({} if version is None else {"version of the task": version})


def _shots(content: Mapping[str, Any], task: str) -> Any:
    """Examples in a prompt of a task or of the parts of a group; ``None`` if the file does not say."""
    shots, children = content.get("n-shot") or {}, content.get("group_subtasks") or {}
    found: set[Any] = set()
    left = [task]
    while left:
        name = left.pop()
        if name in shots:
            found.add(shots[name])
        else:
            left += children.get(name, ())
    return (found.pop() if len(found) == 1 else sorted(found)) if found else None


def _parts(
    tasks: Mapping[str, Any], children: Mapping[str, Sequence[str]] | None
) -> frozenset[str]:
    """Tasks that are in the score of a group."""
    if children is None:
        return frozenset(task for task in tasks if task.startswith(_GROUPS))
    scored = (group for group in children if _chosen(tasks.get(group, {})) is not None)
    return frozenset(task for group in scored for task in children[group])


def _chosen(found: Mapping[str, Any]) -> str | None:
    """One metric of a task with its filter; ``None`` if it has none."""
    metrics = [key for key, value in found.items() if _is_number(value) and "," in key]
    metrics = [key for key in metrics if "_stderr," not in key]
    if not metrics:
        return None
    # Of several filters of one metric the first.
    by_name = {key.partition(",")[0]: key for key in reversed(metrics)}
    return next((by_name[m] for m in _METRICS if m in by_name), metrics[0])


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
