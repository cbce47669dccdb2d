"""FollowBench: answers in its format, verdicts of a judge, and its three scores.

- HSR, hard satisfaction rate: answers that satisfy all constraints of their instruction.
- SSR, soft satisfaction rate: constraints satisfied, of each instruction.
- CSL, consistent satisfaction levels: levels satisfied in a row from level 1 on.

A verdict that cannot be parsed takes no part in a rate and is counted beside it, with the lowest and the
highest value that the rate would have had. The project itself scores it as -1.

Standard errors are over examples: the levels of one, which ask the same with one more constraint each, are
one observation. Examples of different constraint types are taken for independent.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from megatron_ext.data.chat import Message
from megatron_ext.evaluation.completion import Codec
from megatron_ext.evaluation.errors import clustered_error, error_of_mean
from megatron_ext.evaluation.followbench_data import LEVELS, Checkout, Question
from megatron_ext.evaluation.records import Record, read_records
from megatron_ext.evaluation.sampling import Request, Sampling
from megatron_ext.exceptions import DataError

# What the project takes for "no" beside NO, over its versions and its two languages.
_NO = {"NO", "PARTIAL", "PARTIALLY", "MAYBE", "UNKNOWN", "N/A"}


@dataclass(frozen=True)
class Verdict:
    """How many of an instruction's constraints its answer satisfies; ``None`` if it cannot be parsed."""

    question: Question
    satisfied: int | None

    @property
    def hard(self) -> bool | None:
        """Whether all constraints are satisfied."""
        return None if self.satisfied is None else self.satisfied == self.question.level


def parse_verdict(text: str, *, level: int) -> int | None:
    """Count the constraints that a judge calls satisfied.

    The last line is a list of YES and NO, one a constraint; for one constraint it may be the bare word.

    Args:
        text: what the judge said.
        level: number of constraints.

    Returns:
        How many are satisfied; ``None`` if the last line is of another form.
    """
    last = text.strip("` \n\r\t").rpartition("\n")[2]
    if level == 1:
        return 1 if "YES" in last else 0 if "NO" in last else None
    found = re.search(r"\[(.*)\]", last)
    if found is None:
        return None
    words = [word.strip().strip("'\"").strip() for word in found[1].split(",")]
    if len(words) != level or any(word != "YES" and word not in _NO for word in words):
        return None
    return words.count("YES")


def requests(questions: Sequence[Question], codec: Codec, sampling: Sampling) -> list[Request]:
    """A request for the answer to each question."""
    return [
        codec.chat(q.key, [{"role": "user", "content": codec.clean(q.instruction)}], sampling)
        for q in questions
    ]


def answer_file(output: Path, model: str, kind: str) -> Path:
    """Where the project looks for a model's answers."""
    return output / "api_output" / model / f"{kind}_constraint.jsonl"


def verdict_file(output: Path, model: str, kind: str) -> Path:
    """Where the project looks for the judge's texts."""
    return output / "gpt4_discriminative_eval_output" / model / f"{kind}_constraint.jsonl"


def record(prompt: str, text: str) -> Record:
    """A line of both files; newer versions of the project look an answer up by the first key."""
    return {"prompt": prompt, "prompt_new": prompt, "choices": [{"message": {"content": text}}]}


def read_answers(file: Path, questions: Sequence[Question]) -> dict[str, str]:
    """Answers by question.

    Raises:
        DataError: the file is of another form, or an answer is missing.
    """
    found: dict[str, str] = {}
    for number, line in enumerate(read_records(file), start=1):
        try:
            prompt = line["prompt"] if "prompt" in line else line["prompt_new"]
            found[prompt] = line["choices"][0]["message"]["content"]
        except (KeyError, IndexError, TypeError) as error:
            raise DataError(f"{file}: record {number}: expected {error}, found none") from error
    for question in questions:
        if question.instruction not in found:
            raise DataError(f"{file}: expected an answer to {question.key}, found none")
    return {question.key: found[question.instruction] for question in questions}


def judge_prompts(
    checkout: Checkout, questions: Sequence[Question], answers: Mapping[str, str]
) -> dict[str, list[Message]]:
    """Messages for the judge, of the questions that no rule checks."""
    return {
        q.key: [{"role": "user", "content": checkout.judge_prompt(q, answers[q.key])}]
        for q in questions
        if not checkout.is_ruled(q)
    }


def verdicts(
    checkout: Checkout,
    questions: Sequence[Question],
    answers: Mapping[str, str],
    texts: Mapping[str, str],
) -> list[Verdict]:
    """Verdicts of the rules and of the judge.

    Args:
        checkout: the project's rules.
        questions: all questions.
        answers: by question.
        texts: what the judge said, by question.
    """
    found = []
    for q in questions:
        if checkout.is_ruled(q):
            # A rule knows all or nothing; the project takes it for both rates.
            satisfied: int | None = q.level if checkout.check(q, answers[q.key]) else 0
        else:
            satisfied = parse_verdict(texts[q.key], level=q.level)
        found.append(Verdict(q, satisfied))
    return found


def score(found: Sequence[Verdict]) -> dict[str, Any]:
    """The scores of one constraint type, in percent; CSL in levels.

    Returns:
        ``hsr`` and ``ssr`` with a rate for each level, their mean, its standard ``error`` by
        `clustered_error` over examples, the mean weighted by level (of which the project's repository has a
        script) and bounds for what could not be parsed; ``csl``, ``csl_error`` and ``csl_bounds``;
        ``unparsable`` and ``verdicts``, counts.
    """
    examples: dict[int, list[Verdict]] = {}
    for v in found:
        examples.setdefault(v.question.example, []).append(v)

    def rates(soft: bool) -> dict[str, Any]:
        levels = _levels(found)
        by_level = [_rate(verdicts, soft=soft) for verdicts in levels]
        known = [(level, rate) for level, rate in enumerate(by_level, 1) if rate is not None]
        total = sum(level for level, _ in known)
        bounds = [fmean(_bound(verdicts, soft, value) for verdicts in levels) for value in (0, 1)]
        return {
            "levels": by_level,
            "mean": _mean_rate(found, soft=soft),
            "error": clustered_error(
                list(examples.values()), lambda part: _mean_rate(part, soft=soft)
            ),
            "weighted": sum(level * rate for level, rate in known) / total if known else None,
            "bounds": bounds,
        }

    rows = _rows(found)
    return {
        "hsr": rates(soft=False),
        "ssr": rates(soft=True),
        "csl": _consistent_levels(rows),
        "csl_error": clustered_error([[row] for row in rows], _consistent_levels),
        "csl_bounds": [fmean(_in_a_row(row, unknown) for row in rows) for unknown in (False, True)],
        "unparsable": sum(v.satisfied is None for v in found),
        "verdicts": len(found),
    }


def summarise(kinds: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Means over constraint types, each of the same weight, their errors, and the counts of all."""

    def mean(values: Sequence[float | None]) -> float | None:
        known = [value for value in values if value is not None]
        return fmean(known) if known else None

    summary: dict[str, Any] = {
        rate: {
            part: mean([kind[rate][part] for kind in kinds.values()])
            for part in ("mean", "weighted")
        }
        for rate in ("hsr", "ssr")
    }
    for rate in ("hsr", "ssr"):
        known = [kind[rate] for kind in kinds.values() if kind[rate]["mean"] is not None]
        summary[rate]["error"] = error_of_mean(scores["error"] for scores in known)
        summary[rate]["bounds"] = _mean_bounds([kind[rate]["bounds"] for kind in kinds.values()])
    summary["csl"] = mean([kind["csl"] for kind in kinds.values()])
    summary["csl_error"] = error_of_mean(
        kind["csl_error"] for kind in kinds.values() if kind["csl"] is not None
    )
    summary["csl_bounds"] = _mean_bounds([kind["csl_bounds"] for kind in kinds.values()])
    for count in ("unparsable", "verdicts"):
        summary[count] = sum(kind[count] for kind in kinds.values())
    return summary


def _value(verdict: Verdict, soft: bool) -> float:
    assert verdict.satisfied is not None
    return verdict.satisfied / verdict.question.level if soft else float(bool(verdict.hard))


def _rate(found: Sequence[Verdict], *, soft: bool) -> float | None:
    known = [_value(v, soft) for v in found if v.satisfied is not None]
    return 100 * fmean(known) if known else None


def _levels(found: Sequence[Verdict]) -> list[list[Verdict]]:
    return [[v for v in found if v.question.level == level] for level in range(1, LEVELS + 1)]


def _mean_rate(found: Sequence[Verdict], *, soft: bool) -> float | None:
    """Mean of the rates of the levels of which a verdict is known, in percent."""
    rates = [_rate(verdicts, soft=soft) for verdicts in _levels(found)]
    known = [rate for rate in rates if rate is not None]
    return fmean(known) if known else None


def _bound(found: Sequence[Verdict], soft: bool, unknown: float) -> float:
    return 100 * fmean(unknown if v.satisfied is None else _value(v, soft) for v in found)


def _mean_bounds(bounds: Sequence[Sequence[float]]) -> list[float]:
    return [fmean(ends) for ends in zip(*bounds, strict=True)]


def _rows(found: Sequence[Verdict]) -> list[list[bool | None]]:
    """What is known of the levels of each example, from the first on."""
    groups: dict[int, dict[int, bool | None]] = {}
    for v in found:
        groups.setdefault(v.question.example, {})[v.question.level] = v.hard
    return [[levels[level] for level in sorted(levels)] for levels in groups.values()]


def _in_a_row(row: Sequence[bool | None], unknown: bool) -> int:
    """Levels satisfied in a row, if what could not be parsed were so."""
    known = [unknown if hard is None else hard for hard in row]
    return [*known, False].index(False)


def _consistent_levels(rows: Sequence[Sequence[bool | None]]) -> float | None:
    """Expected levels in a row; ``None`` if those who come to a level are all unparsable there.

    The rate of each level is that of the examples which satisfied all before it, and its verdict counts for
    nothing where it cannot be parsed. To leave out such examples altogether would leave out those that have
    come far, for only they come to a verdict of a higher level.
    """
    mean, reached = 0.0, 1.0
    for level in range(LEVELS):
        known = [row[level] for row in rows if all(row[:level]) and row[level] is not None]
        if reached and not known:
            return None
        reached *= sum(map(bool, known)) / max(1, len(known))
        mean += reached
    return mean
