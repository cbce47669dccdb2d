"""Byte-level tokenizers as gigatoken takes them: it wants all 256 bytes, and no digits split off.

Of SmolLM2's tokenizer both are missing, and StarCoder's splits digits off as well. Without this they are
encoded by the exact tokenizer, at a fiftieth of the speed.
"""

import json
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Adapted:
    """A tokenizer that gigatoken can load, and what is to be done around it.

    Attributes:
        tokenizer: Of transformers or tokenizers.
        missing: The first id of the bytes that the tokenizer lacks; `None` if it has all. They are in no
            merge, so they change nothing of a text that has none of them.
        split: Cuts a text where the tokenizer does before anything else, into what is to be encoded by
            itself; `None` if it does not.
    """

    tokenizer: Any
    missing: int | None = None
    split: Callable[[str], Sequence[str]] | None = None


def adapt(tokenizer: Any) -> Adapted:
    """Makes of a fast tokenizer of transformers one that gigatoken can load, if it is of these kinds.

    Args:
        tokenizer: Any fast tokenizer; one of another kind comes back as it is.
    """
    definition = json.loads(tokenizer.backend_tokenizer.to_str())
    if definition["model"]["type"] != "BPE":
        return Adapted(tokenizer)
    split = _take_digits(definition)
    missing = _add_bytes(definition)
    if split is None and missing is None:
        return Adapted(tokenizer)
    from tokenizers import Tokenizer

    return Adapted(Tokenizer.from_str(json.dumps(definition)), missing, split)


def _add_bytes(definition: dict[str, Any]) -> int | None:
    """Gives every byte a token; the first id of those that had none."""
    from tokenizers import pre_tokenizers

    if "ByteLevel" not in [step["type"] for step in _steps(definition)]:
        return None
    vocabulary = definition["model"]["vocab"]
    lacking = sorted({*pre_tokenizers.ByteLevel.alphabet()} - {*vocabulary})
    if not lacking:
        return None
    # A token that stands apart from the vocabulary would be numbered anew, behind what is added.
    vocabulary |= {token["content"]: token["id"] for token in definition["added_tokens"]}
    first = max(vocabulary.values()) + 1
    vocabulary |= {character: first + i for i, character in enumerate(lacking)}
    return first


def _take_digits(definition: dict[str, Any]) -> Callable[[str], Sequence[str]] | None:
    """Takes out the step that splits digits off, if nothing stands before it, and does what it does."""
    steps = _steps(definition)
    if definition["normalizer"] is not None or len(steps) != 2:
        return None
    digits, rest = steps
    # A blank is put before each piece of a text where it is asked for, which gigatoken does not.
    if digits["type"] != "Digits" or rest["type"] != "ByteLevel" or rest["add_prefix_space"]:
        return None
    definition["pre_tokenizer"] = rest
    return _splitter(_numbers(), individual=digits["individual_digits"])


def _steps(definition: dict[str, Any]) -> list[dict[str, Any]]:
    """The pre-tokenizers, in their order."""
    whole = definition["pre_tokenizer"]
    if whole is None:
        return []
    return [*whole["pretokenizers"]] if whole["type"] == "Sequence" else [whole]


def _splitter(numbers: list[str], *, individual: bool) -> Callable[[str], Sequence[str]]:
    """Cuts texts into numbers and what stands between them.

    Python's expressions test a class by one look-up if all of it lies below U+10000, else range by range, ten
    times as slowly.
    """

    def pieces(below: str) -> Callable[[str], Sequence[str]]:
        held = "".join(f"{run[0]}-{run[-1]}" for run in numbers if run[0] < below)
        return re.compile(f"[{held}]{'' if individual else '+'}|[^{held}]+").findall

    ascii_pieces, basic_pieces, all_pieces = map(pieces, ("\x80", "\U00010000", "\U0010ffff"))
    is_beyond = re.compile("[\U00010000-\U0010ffff]").search

    def split(text: str) -> Sequence[str]:
        if text.isascii():
            return ascii_pieces(text)
        return all_pieces(text) if is_beyond(text) else basic_pieces(text)

    return split


def _numbers() -> list[str]:
    """All characters that tokenizers takes for digits, in runs of consecutive ones."""
    from tokenizers import pre_tokenizers

    characters = [chr(code) for code in range(sys.maxunicode + 1) if not 0xD800 <= code < 0xE000]
    pieces = pre_tokenizers.Digits(individual_digits=False).pre_tokenize_str("".join(characters))
    # Pieces take turns, and the first character is none.
    return [run for run, _ in pieces[1::2]]
