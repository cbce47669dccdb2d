"""Records: the texts of a document, or why there are none."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class BadRecord:
    """A record that yields no document: where, why in a few fixed words, and what was found."""

    where: str
    reason: str
    detail: str

    def __str__(self) -> str:
        return f"{self.where}: {self.reason}" + (f" ({self.detail})" if self.detail else "")


# A good record: for each key the sequences of the document, most often one.
Record = list[list[str]]


def parse_json(line: bytes, where: str, keys: Sequence[str]) -> Record | BadRecord:
    """Takes the texts of the keys out of a line of JSON."""
    try:
        value = json.loads(line.decode())
    except UnicodeDecodeError as error:
        return BadRecord(where, "not UTF-8", str(error))
    except (ValueError, RecursionError) as error:
        return BadRecord(
            where, "not valid JSON", f"{error}; the line starts {excerpt(line.decode())}"
        )
    if not isinstance(value, dict):
        return BadRecord(where, "expected a JSON object", f"found {excerpt(line.decode())}")
    return take(value, where, keys)


def take(value: dict[str, Any], where: str, keys: Sequence[str]) -> Record | BadRecord:
    """Takes the texts of the keys; as in Megatron, a list is a document of several sequences."""
    record: Record = []
    for key in keys:
        if key not in value:
            return BadRecord(
                where, f"no key {key!r}", f"found {excerpt(', '.join(map(str, value)))}"
            )
        texts = value[key] if isinstance(value[key], list) else [value[key]]
        for text in texts:
            if not isinstance(text, str):
                return BadRecord(
                    where, f"expected a string at {key!r}", f"found {type(text).__name__}"
                )
            try:
                text.encode()
            except UnicodeEncodeError as error:
                return BadRecord(where, f"text at {key!r} is not valid Unicode", str(error))
        record.append(texts)
    return record


def excerpt(text: str) -> str:
    """The beginning of what was found, for messages."""
    return repr(text[:60]) + ("..." if len(text) > 60 else "")
