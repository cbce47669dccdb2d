"""FollowBench's own files: its questions, and from its code the judge prompts and the rules.

arXiv 2310.20410. Nothing of the project is copied here: a user names a checkout, whose question files are
read and whose functions make the prompts and check the answers that rules can check. So that code runs in
this process, as it would by the project's own scripts; what the judge says does not.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from megatron_ext.exceptions import DataError

LEVELS = 5
KINDS = ("content", "situation", "style", "format", "example", "mixed")
_PROMPTS, _RULES = "gpt4_based_evaluation", "rule_based_evaluation"
# Examples of the format set that the project checks by rules.
_RULED_FORMATS = {"en": (22, 30), "zh": (22,)}


@dataclass(frozen=True)
class Question:
    """An instruction with `level` constraints.

    Attributes:
        kind: constraint type, one of `KINDS`.
        example: the group that it belongs to, whose levels add one constraint each.
        level: from 1 to `LEVELS`.
        instruction: what the model is asked.
        path: instructions of the group from the initial one up to this one; the judge sees them.
        record: the line of the project's file.
    """

    kind: str
    example: int
    level: int
    instruction: str
    path: tuple[str, ...]
    record: dict[str, Any]

    @property
    def key(self) -> str:
        """Names the question."""
        return f"{self.kind} {self.example} {self.level}"


class Checkout:
    """A copy of the project.

    Args:
        folder: the checkout.
        language: ``en`` or ``zh``: which of its two sets.

    Raises:
        DataError: a file or a function of the project is missing.
    """

    def __init__(self, folder: Path, *, language: str = "en") -> None:
        suffix = "" if language == "en" else f"_{language}"
        self._data, self._code = folder / f"data{suffix}", folder / f"code{suffix}"
        self._ruled_formats = _RULED_FORMATS[language]
        self._prompts, self._rules = _load(self._code, (_PROMPTS, _RULES))

    def questions(self, kind: str) -> list[Question]:
        """Questions of a constraint type, in the order of the file.

        Raises:
            DataError: the file is missing or of another form.
        """
        file = self._data / f"{kind}_constraints.json"
        try:
            records = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise DataError(f"{file}: expected FollowBench's questions, {error}") from error
        paths: dict[int, list[str]] = {}
        questions = []
        for number, record in enumerate(records):
            try:
                example, level = record["example_id"], record["level"]
                instruction = record["instruction"]
                record["category"], record["source"], record["target"]
            except (KeyError, TypeError) as error:
                raise DataError(f"{file}: record {number}: expected {error}, found none") from error
            paths.setdefault(example, []).append(instruction)
            if level:
                path = tuple(paths[example])
                questions.append(Question(kind, example, level, instruction, path, record))
        _check_levels(questions, file)
        return questions

    def is_ruled(self, question: Question) -> bool:
        """Whether a rule checks the answer, and no judge."""
        record = question.record
        if question.kind == "example" or hasattr(
            self._rules, f"rule_evaluation_{record['source']}"
        ):
            return True
        return record["category"] == "format" and question.example in self._ruled_formats

    def check(self, question: Question, answer: str) -> bool:
        """Whether an answer satisfies all constraints, by the project's rule."""
        record, rules = question.record, self._rules
        if question.kind == "example":
            return bool(rules.check_match(record["target"].replace("{instruction}\n", ""), answer))
        rule = getattr(rules, f"rule_evaluation_{record['source']}", None)
        if rule is not None:
            return bool(rule(answer, record["target"], question.level))
        return bool(rules.rule_evaluation_format(answer, question.example, question.level))

    def judge_prompt(self, question: Question, answer: str) -> str:
        """What the project asks a judge."""
        name = f"{question.kind}_evaluation_prompt"
        prompt = getattr(self._prompts, name, None)
        if prompt is None:
            raise DataError(f"{self._code / _PROMPTS}.py: expected a function {name}, found none")
        return str(prompt(list(question.path), answer))


def _check_levels(questions: Sequence[Question], file: Path) -> None:
    groups: dict[int, list[int]] = {}
    for question in questions:
        groups.setdefault(question.example, []).append(question.level)
    for example, levels in groups.items():
        if levels != list(range(1, LEVELS + 1)):
            raise DataError(
                f"{file}: example {example}: expected levels 1 to {LEVELS}, found {levels}"
            )


def _load(folder: Path, names: Sequence[str]) -> list[ModuleType]:
    """Import modules of a folder that import each other by bare names, without keeping these names."""
    before = dict(sys.modules)
    sys.path.insert(0, str(folder))
    try:
        return [_import(folder / f"{name}.py", name) for name in names]
    finally:
        sys.path.remove(str(folder))
        for name in (file.stem for file in folder.glob("*.py")):
            sys.modules.pop(name, None)
            if name in before:
                sys.modules[name] = before[name]


def _import(file: Path, name: str) -> ModuleType:
    if not file.is_file():
        raise DataError(f"--followbench: expected a checkout of FollowBench, found no {file}")
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # somebody else's code
        raise DataError(f"{file} cannot be imported: {type(error).__name__}: {error}") from error
    return module
