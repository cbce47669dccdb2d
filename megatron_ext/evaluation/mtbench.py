"""MT-Bench: two-turn answers in its format, verdicts of a judge, scores from 1 to 10.

arXiv 2306.05685. Questions, reference answers and judge prompts are read from the project's own files
(FastChat, `fastchat/llm_judge/data`); answers and judgments are written in its formats.

A verdict that cannot be parsed takes no part in a mean and is counted beside it, with the lowest and the
highest value that the mean would have had. Standard errors are over questions: both turns of one are one
observation.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

from megatron_ext.data.chat import Message
from megatron_ext.evaluation.completion import Codec
from megatron_ext.evaluation.errors import clustered_error
from megatron_ext.evaluation.records import Record, read_records
from megatron_ext.evaluation.sampling import Request, Sampling
from megatron_ext.exceptions import DataError

# Categories whose answers are judged beside a reference.
REFERENCED = ("math", "reasoning", "coding")
# Temperature of the answers, by category; 0.7 for others.
TEMPERATURES = {
    "extraction": 0.0,
    "math": 0.0,
    "coding": 0.0,
    "reasoning": 0.0,
    "stem": 0.1,
    "humanities": 0.1,
}
OTHER_TEMPERATURE = 0.7
LOWEST, HIGHEST = 1, 10
_RATINGS = (re.compile(r"\[\[(\d+\.?\d*)\]\]"), re.compile(r"\[(\d+\.?\d*)\]"))
# Names of the project's judge prompts, by turn.
_PROMPTS = {
    False: ("single-v1", "single-v1-multi-turn"),
    True: ("single-math-v1", "single-math-v1-multi-turn"),
}


@dataclass(frozen=True)
class Question:
    """A question of two turns, or of one."""

    id: int
    category: str
    turns: tuple[str, ...]

    def key(self, turn: int) -> str:
        """Names a turn, counted from 0."""
        return f"{self.id} {turn + 1}"


@dataclass(frozen=True)
class Verdict:
    """The rating of a turn; ``None`` if it cannot be parsed."""

    question: Question
    turn: int
    rating: float | None


def read_questions(file: Path) -> list[Question]:
    """Read the project's questions.

    Raises:
        DataError: a record is of another form; names it.
    """
    questions = []
    for number, record in enumerate(read_records(file), start=1):
        try:
            turns = tuple(record["turns"])
            questions.append(Question(record["question_id"], record["category"], turns))
        except (KeyError, TypeError) as error:
            raise DataError(f"{file}: record {number}: expected {error}, found none") from error
        if not 1 <= len(turns) <= 2 or not all(isinstance(turn, str) for turn in turns):
            raise DataError(f"{file}: record {number}: expected one or two turns, found {turns!r}")
    return questions


def read_answers(file: Path, questions: Sequence[Question]) -> dict[int, list[str]]:
    """Read answers, or reference answers, by question.

    Raises:
        DataError: a record is of another form, or one of the questions has no answer to each turn.
    """
    found: dict[int, list[str]] = {}
    for number, record in enumerate(read_records(file), start=1):
        try:
            found[record["question_id"]] = list(record["choices"][0]["turns"])
        except (KeyError, IndexError, TypeError) as error:
            raise DataError(f"{file}: record {number}: expected {error}, found none") from error
    for question in questions:
        if len(found.get(question.id, ())) < len(question.turns):
            raise DataError(
                f"{file}: expected {len(question.turns)} answers to question {question.id}, found "
                f"{len(found.get(question.id, ()))}"
            )
    return found


def read_prompts(file: Path) -> dict[str, Record]:
    """Read the project's judge prompts.

    Raises:
        DataError: one that grades a single answer is missing or of another form.
    """
    prompts = {record.get("name", ""): record for record in read_records(file)}
    for name in (name for names in _PROMPTS.values() for name in names):
        if name not in prompts:
            raise DataError(f"{file}: expected a judge prompt {name}, found none")
        missing = {"system_prompt", "prompt_template"} - prompts[name].keys()
        if missing:
            raise DataError(f"{file}: {name}: expected {min(missing)}, found none")
    return prompts


def requests(
    questions: Sequence[Question], before: Mapping[int, list[str]], codec: Codec, base: Sampling
) -> list[Request]:
    """Requests for the next turn of each question.

    Args:
        questions: those that have one.
        before: answers to the turns before it.
        codec: the model's tokenizer.
        base: settings but for the temperature, which follows from the category.

    Raises:
        DataError: the chat template refuses the turns; names the question.
    """
    found = []
    for question in questions:
        answers = before.get(question.id, [])
        messages: list[Message] = []
        for turn, text in enumerate(question.turns[: len(answers) + 1]):
            messages.append({"role": "user", "content": codec.clean(text)})
            if turn < len(answers):
                messages.append({"role": "assistant", "content": codec.clean(answers[turn])})
        temperature = TEMPERATURES.get(question.category, OTHER_TEMPERATURE)
        sampling = replace(base, temperature=temperature)
        try:
            found.append(codec.chat(question.key(len(answers)), messages, sampling))
        except DataError as error:
            raise DataError(f"question {question.id}, turn {len(answers) + 1}: {error}") from error
    return found


def judge_prompts(
    questions: Sequence[Question],
    answers: Mapping[int, list[str]],
    references: Mapping[int, list[str]],
    prompts: Mapping[str, Record],
) -> dict[str, list[Message]]:
    """Messages for the judge, for each turn of each question.

    Raises:
        DataError: a judge prompt names a field that there is none of.
    """
    found = {}
    for question in questions:
        fields = {"question": question.turns[0], "answer": answers[question.id][0]}
        groups = [("question", question.turns), ("answer", answers[question.id])]
        if question.category in REFERENCED:
            groups.append(("ref_answer", references[question.id]))
        for name, texts in groups:
            fields |= {f"{name}_{i}": text for i, text in enumerate(texts, start=1)}
        for turn in range(len(question.turns)):
            name = prompt_name(question, turn)
            found[question.key(turn)] = [
                {"role": "system", "content": prompts[name]["system_prompt"]},
                {"role": "user", "content": _fill(prompts[name]["prompt_template"], fields, name)},
            ]
    return found


def _fill(template: str, fields: Mapping[str, str], name: str) -> str:
    """Put texts into a template, and nothing else: no attribute, no index, no format."""

    def text(found: re.Match[str]) -> str:
        if found[1] not in fields:
            raise DataError(f"judge prompt {name}: expected a known field, found {{{found[1]}}}")
        return fields[found[1]]

    return re.sub(r"\{(\w+)\}", text, template)


def prompt_name(question: Question, turn: int) -> str:
    """The judge prompt of a turn."""
    return _PROMPTS[question.category in REFERENCED][turn]


def parse_rating(text: str) -> float | None:
    """The rating that a judge gives as ``[[rating]]``, or else as ``[rating]``.

    Returns:
        ``None`` if there is none, or none from 1 to 10.
    """
    for pattern in _RATINGS:
        found = pattern.search(text)
        if found:
            rating = float(found[1])
            return rating if LOWEST <= rating <= HIGHEST else None
    return None


def score(found: Sequence[Verdict]) -> dict[str, Any]:
    """Means over verdicts: of all, of each turn, and of each category.

    Returns:
        For each a ``mean``, its standard ``error`` by `clustered_error` over questions (``None`` for fewer
        than two), ``bounds``, and the counts ``unparsable`` and ``verdicts``.
    """
    categories = dict.fromkeys(v.question.category for v in found)
    return {
        "all": _mean(found),
        "turns": {str(t + 1): _mean([v for v in found if v.turn == t]) for t in (0, 1)},
        "categories": {
            c: _mean([v for v in found if v.question.category == c]) for c in categories
        },
    }


def _mean(found: Sequence[Verdict]) -> dict[str, Any]:
    ratings = [v.rating for v in found]
    bounds = [
        fmean(end if rating is None else rating for rating in ratings) if ratings else None
        for end in (LOWEST, HIGHEST)
    ]
    questions: dict[int, list[float]] = {}
    for v in found:
        if v.rating is not None:
            questions.setdefault(v.question.id, []).append(v.rating)
    known = [rating for rating in ratings if rating is not None]
    return {
        "mean": fmean(known) if known else None,
        "error": clustered_error(list(questions.values()), fmean),
        "bounds": bounds,
        "unparsable": len(ratings) - len(known),
        "verdicts": len(ratings),
    }
