"""Instructions that a rule can check: letters, beginning, length, format and language of an answer.

An empty answer follows none.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Callable

# Rule -> what it is about; the five kinds that scores are given for.
KINDS = {
    "upper": "case",
    "lower": "case",
    "prefix": "prefix",
    "at_most_words": "length",
    "bullets": "format",
    "json": "format",
    "chinese": "language",
    "english": "language",
}


def follows(rule: str, argument: str | int | None, answer: str) -> bool:
    """Whether an answer follows an instruction.

    Args:
        rule: one of `KINDS`.
        argument: of `prefix` the text, of `at_most_words` and `bullets` the number, else ``None``.
        answer: what the model wrote.

    Raises:
        KeyError: there is no such rule.
    """
    answer = answer.strip()
    return bool(answer) and _CHECKS[rule](answer, argument)


def _upper(answer: str, _: object) -> bool:
    return answer.isupper()


def _lower(answer: str, _: object) -> bool:
    return answer.islower()


def _prefix(answer: str, argument: object) -> bool:
    return answer.startswith(str(argument))


def _at_most_words(answer: str, argument: object) -> bool:
    return len(answer.split()) <= int(str(argument))


def _bullets(answer: str, argument: object) -> bool:
    lines = [line for line in answer.splitlines() if line.strip()]
    return len(lines) == int(str(argument)) and all(re.match(r"[-*] +\S", line) for line in lines)


def _json(answer: str, _: object) -> bool:
    try:
        return isinstance(json.loads(answer), dict)
    except ValueError:
        return False


def _share_of_han(answer: str) -> float:
    """Of the letters."""
    letters = [letter for letter in answer if letter.isalpha()]
    han = [letter for letter in letters if unicodedata.name(letter, "").startswith("CJK UNIFIED")]
    return len(han) / len(letters) if letters else 0.0


def _chinese(answer: str, _: object) -> bool:
    return _share_of_han(answer) > 0.5


def _english(answer: str, _: object) -> bool:
    return any("a" <= letter <= "z" for letter in answer.lower()) and _share_of_han(answer) == 0


_CHECKS: dict[str, Callable[[str, str | int | None], bool]] = {
    "upper": _upper,
    "lower": _lower,
    "prefix": _prefix,
    "at_most_words": _at_most_words,
    "bullets": _bullets,
    "json": _json,
    "chinese": _chinese,
    "english": _english,
}
