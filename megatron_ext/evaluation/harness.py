"""lm-evaluation-harness from the command line: scores of tasks, beside those of arXiv 2406.12397."""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import json
import logging
import math
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator, Mapping
from pathlib import Path
from statistics import fmean
from typing import Any
from unittest import mock

from megatron_ext.data.atomic import check_place, refuse_existing, write_atomically
from megatron_ext.evaluation import code_execution, paper
from megatron_ext.evaluation.backends import add_model_arguments, open_generator
from megatron_ext.evaluation.errors import error_of_mean, with_error
from megatron_ext.evaluation.local_data import offline
from megatron_ext.exceptions import ConfigError

logger = logging.getLogger(__name__)

OWN_TASKS = Path(__file__).parent / "tasks"
INSTALL = "pip install -r requirements-eval.txt"
_KEPT = (
    "results",
    "groups",
    "group_subtasks",
    "versions",
    "n-shot",
    "n-samples",
    "higher_is_better",
)


def add_arguments(parser: ArgumentParser) -> None:
    """Flags of the verb."""
    parser.add_argument(
        "--tasks",
        nargs="+",
        required=True,
        help="names of tasks of the harness or of --include-path",
    )
    parser.add_argument(
        "--include-path", type=Path, nargs="+", default=[], help="folders with tasks of your own"
    )
    parser.add_argument(
        "--data-dir",
        type=Path,
        help="folder of data sets under their names on the hub, such as cais/mmlu, in place of a download",
    )
    parser.add_argument("--name", required=True, help="name of the model in the table")
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing output")
    parser.add_argument("--num-fewshot", type=int, help="default: the task's own")
    parser.add_argument(
        "--limit", type=int, help="use only this many samples per task, to try it out"
    )
    parser.add_argument(
        "--apply-chat-template",
        action="store_true",
        help="for chat models: ask through the chat template",
    )
    parser.add_argument(
        "--log-samples", action="store_true", help="keep every answer in the output"
    )
    parser.add_argument("--seed", type=int, default=1234, help="seed of sampling")
    parser.add_argument(
        "--allow-code-execution",
        action="store_true",
        help="let humaneval and mbpp execute the model's code on this machine",
    )
    add_model_arguments(parser)


def run(options: Namespace) -> None:
    """Evaluate, write the results and print the tables.

    Raises:
        ConfigError: the harness is not installed, or does not know a task.
        DataError: a data set is missing.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise ConfigError(f"lm-evaluation-harness: expected lm_eval, found none; {INSTALL}")
    if options.is_writer:
        check_place(options.output, flag="--output")
    refuse_existing([options.output], overwrite=options.overwrite)
    local = offline(options.data_dir) if options.data_dir else contextlib.nullcontext()
    with local, _code_execution(options.allow_code_execution):
        from lm_eval.tasks import TaskManager

        manager = TaskManager(include_path=[str(OWN_TASKS), *map(str, options.include_path)])
        unknown = sorted(set(options.tasks) - set(manager.all_tasks))
        if unknown:
            raise ConfigError(f"--tasks: expected tasks of the harness, found {', '.join(unknown)}")
        found = _evaluate(options, manager)
    if found is None:
        return
    results = {"settings": _settings(options), **found}
    text = json.dumps(results, indent=1, ensure_ascii=False, default=str)
    write_atomically(options.output, text.encode(), overwrite=options.overwrite)
    print(report(options.name, results))
    print(f"\n{options.output}")


def _evaluate(options: Namespace, manager: Any) -> dict[str, Any] | None:
    """The harness's results on the rank that writes, ``None`` on the others."""
    from lm_eval import simple_evaluate

    from megatron_ext.evaluation.harness_model import HarnessModel

    with open_generator(options) as (generator, codec):
        model = HarnessModel(generator, codec, seed=options.seed)
        found = simple_evaluate(
            model=model,
            tasks=options.tasks,
            num_fewshot=options.num_fewshot,
            limit=options.limit,
            apply_chat_template=options.apply_chat_template,
            fewshot_as_multiturn=options.apply_chat_template,
            confirm_run_unsafe_code=options.allow_code_execution,
            log_samples=options.log_samples,
            task_manager=manager,
        )
        if model.truncated and generator.is_writer:
            logger.warning(
                "%d prompts were longer than the model's context of %d tokens and lost their beginning",
                *(model.truncated, generator.context_length),
            )
        if model.shortened and generator.is_writer:
            logger.warning(
                "%d answers had room in the model's context for fewer tokens than their task allows",
                model.shortened,
            )
        if not generator.is_writer:
            return None
        assert found is not None
        kept = {key: found[key] for key in _KEPT if key in found}
        kept |= {"model": generator.identity, "truncated_prompts": model.truncated}
        kept["shortened_answers"] = model.shortened
        return kept | ({"samples": found["samples"]} if options.log_samples else {})


def _settings(options: Namespace) -> dict[str, Any]:
    version = importlib.metadata.version("lm_eval")
    return {"lm_eval": version} | {k: v for k, v in vars(options).items() if k != "is_writer"}


@contextlib.contextmanager
def _code_execution(allowed: bool) -> Iterator[None]:
    """Where it is allowed, what the tasks would fetch from the hub to run programs is ours."""
    if not allowed:
        yield
        return
    import evaluate

    with mock.patch.object(evaluate, "load", code_execution.load):
        yield


def report(name: str, results: Mapping[str, Any]) -> str:
    """The table beside the paper's, and every score of the other tasks; ± is a standard error.

    That of the average takes the benchmarks, whose questions are different ones, for independent.
    """
    scores: Mapping[str, Mapping[str, Any]] = results["results"]
    limit = results["settings"]["limit"]
    values: list[float | None] = []
    errors: list[float | None] = []
    for task, metric in paper.BENCHMARKS.values():
        value, error = _number(scores.get(task, {}), metric), _error(scores.get(task, {}), metric)
        values.append(None if value is None else 100 * value)
        errors.append(None if error is None else 100 * error)
    known = [value for value in values if value is not None]
    lines = []
    if limit:
        lines.append(f"of the first {limit} samples of each task (--limit), unlike the paper's\n")
    if known:
        average = fmean(known) if len(known) == len(values) else None
        theirs = {model: (*numbers, fmean(numbers)) for model, numbers in paper.BASE.items()}
        ours = {name: (*values, average)}
        beside = {name: (*errors, error_of_mean(errors))}
        columns = (*paper.BENCHMARKS, "average")
        lines.append(f"{paper.table(columns, ours, theirs, errors=beside)}\n")
    for task, metrics in scores.items():
        text = "  ".join(
            f"{metric.removesuffix(',none')} {with_error(value, _error(metrics, metric), digits=4)}"
            for metric, value in metrics.items()
            if isinstance(value, float) and "_stderr," not in metric
        )
        if text:
            lines.append(f"{task:<24} {text}")
    return "\n".join(lines)


def _error(metrics: Mapping[str, Any], metric: str) -> float | None:
    """The harness's standard error of a metric such as ``acc,none``, if it has one."""
    name, _, variant = metric.partition(",")
    return _number(metrics, f"{name}_stderr,{variant}")


def _number(metrics: Mapping[str, Any], key: str) -> float | None:
    """What the harness has under a name; where it could not compute an error it says so in words."""
    value = metrics.get(key)
    return value if isinstance(value, int | float) and math.isfinite(value) else None
