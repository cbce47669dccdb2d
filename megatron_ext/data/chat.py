"""Reading conversations: four shapes of JSON lines become one list of messages.

The shape of a file is that of its first record, and every later record must have it: a file of two
shapes is a mistake more often than a wish. Keys that belong to no shape are ignored, but for those under
which some sets keep further turns: a record that has any there is refused.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_ext.data.compression import open_stream, read_lines
from megatron_ext.data.records import BadRecord, excerpt
from megatron_ext.exceptions import DataError

# {"role": "system" | "user" | "assistant", "content": text}
Message = dict[str, str]

_CONTAINERS = ("messages", "conversations")
_FURTHER_TURNS = ("system", "history")
# Key of the speaker, key of the text, and the names of the speakers.
_ROLE_CONTENT = ("role", "content", {"system": "system", "user": "user", "assistant": "assistant"})
_FROM_VALUE = ("from", "value", {"system": "system", "human": "user", "gpt": "assistant"})
_EXPECTED = (
    'expected a list of turns, {"messages": [turns]}, {"conversations": [turns]} or {"query": text, '
    '"response": text}, a turn being {"role", "content"} or {"from", "value"}'
)


@dataclass(frozen=True)
class Conversation:
    """A conversation with at least one assistant turn, and its place as ``file:line``."""

    where: str
    messages: list[Message]


@dataclass(frozen=True)
class Shape:
    """Where a record keeps its turns.

    Attributes:
        container: key of the list of turns; ``None`` if the record is that list.
        speaker: key of a turn's speaker; ``None`` for a query and its response.
        text: key of a turn's text.
        roles: role of each speaker.
    """

    container: str | None = None
    speaker: str | None = None
    text: str = ""
    roles: tuple[tuple[str, str], ...] = ()

    def __str__(self) -> str:
        if self.speaker is None:
            return '{"query", "response"}'
        turns = f'[{{"{self.speaker}", "{self.text}"}}, ...]'
        return turns if self.container is None else f'{{"{self.container}": {turns}}}'


class _ShapeError(Exception):
    """A record that is no conversation: what was expected, and what was found."""

    def __init__(self, expected: str, found: str) -> None:
        super().__init__(expected, found)
        self.expected, self.found = expected, found


def read_conversations(paths: Sequence[Path]) -> Iterator[Conversation | BadRecord]:
    """Read JSON lines, plain or compressed (.gz, .zst), in order.

    Args:
        paths: the files; each may have another shape.

    Yields:
        Conversations, and the records that are none, each with its file and line.

    Raises:
        DataError: a file cannot be read, or its first record has no known shape.
    """
    for path in paths:
        shape: Shape | None = None
        for number, line in _lines(path):
            where = f"{path}:{number}"
            shape = shape or shape_of(line, where)
            yield take_conversation(line, where, shape)


def shape_of(line: bytes, where: str) -> Shape:
    """The shape that the first line of a file gives it.

    Raises:
        DataError: it is no conversation of a known shape; names the place.
    """
    try:
        return detect_shape(_parse(line))
    except _ShapeError as bad:
        raise DataError(str(_bad_record(where, bad))) from bad


def take_conversation(line: bytes, where: str, shape: Shape) -> Conversation | BadRecord:
    """The conversation of a line, or why it is none of this shape.

    Args:
        line: of a file.
        where: its place.
        shape: of the file's first record.
    """
    try:
        return Conversation(where, take_messages(_parse(line), shape))
    except _ShapeError as bad:
        return _bad_record(where, bad)


def _bad_record(where: str, bad: _ShapeError) -> BadRecord:
    return BadRecord(where, bad.expected, f"found {bad.found}")


def detect_shape(record: Any) -> Shape:
    """The shape of a parsed record; a private error names what was expected and found."""
    if isinstance(record, dict) and {"query", "response"} <= record.keys():
        return Shape()
    container = None
    if isinstance(record, dict):
        container = next((key for key in _CONTAINERS if key in record), None)
        if container is None:
            raise _ShapeError(_EXPECTED, f"the keys {excerpt(', '.join(record))}")
    turns = record if container is None else record[container]
    first = turns[0] if isinstance(turns, list) and turns else None
    for speaker, text, roles in (_ROLE_CONTENT, _FROM_VALUE):
        if isinstance(first, dict) and {speaker, text} <= first.keys():
            return Shape(container, speaker, text, tuple(roles.items()))
    raise _ShapeError(_EXPECTED, excerpt(json.dumps(first if first is not None else turns)))


def take_messages(record: Any, shape: Shape) -> list[Message]:
    """The messages of a record of a known shape; a private error says why there are none.

    An empty system turn, which some sets carry in every record, is left out.
    """
    for key in _FURTHER_TURNS:
        if isinstance(record, dict) and record.get(key):
            raise _ShapeError(f"expected all turns in {shape}", f'more of them in "{key}"')
    if shape.speaker is None:
        if not isinstance(record, dict) or not {"query", "response"} <= record.keys():
            raise _ShapeError(
                f"expected {shape} as in the first record", excerpt(json.dumps(record))
            )
        pairs = (("user", "query"), ("assistant", "response"))
        return [{"role": role, "content": _text(record[key], key)} for role, key in pairs]
    turns = record
    if shape.container is not None:
        turns = record.get(shape.container) if isinstance(record, dict) else None
    if not isinstance(turns, list) or not turns:
        raise _ShapeError(f"expected {shape} as in the first record", excerpt(json.dumps(record)))
    messages = _take_turns(turns, shape, like=" as in the first record")
    if not any(message["role"] == "assistant" for message in messages):
        found = ", ".join(message["role"] for message in messages) or "no turn"
        raise _ShapeError("expected at least one assistant turn", found)
    return messages


def check_question(turns: Any) -> None:
    """Whether an assistant can answer turns of {"role", "content"}, by the rules for conversations.

    Raises:
        DataError: says which turn is none, or that the last one is the assistant's own.
    """
    try:
        if not isinstance(turns, list) or not turns:
            raise _ShapeError("expected a list of turns", excerpt(json.dumps(turns)))
        shape = Shape("messages", *_ROLE_CONTENT[:2], tuple(_ROLE_CONTENT[2].items()))
        _take_turns(turns, shape, empty=("",))
        if turns[-1]["role"] == "assistant":
            raise _ShapeError(
                f"expected the assistant to answer turn {len(turns)}, the last", "its own turn"
            )
    except _ShapeError as bad:
        raise DataError(f"{bad.expected}, found {bad.found}") from bad


def _take_turns(
    turns: Sequence[Any], shape: Shape, *, like: str = "", empty: Sequence[Any] = ("", None)
) -> list[Message]:
    """The messages of turns of a shape; `empty` are the texts of a system turn that is left out."""
    roles = dict(shape.roles)
    messages: list[Message] = []
    for index, turn in enumerate(turns, start=1):
        if not isinstance(turn, dict) or not {shape.speaker, shape.text} <= turn.keys():
            expected = f'expected turn {index} with "{shape.speaker}" and "{shape.text}"{like}'
            raise _ShapeError(expected, excerpt(json.dumps(turn)))
        role = roles.get(str(turn[shape.speaker]))
        if role is None:
            names = ", ".join(roles)
            found = excerpt(str(turn[shape.speaker]))
            raise _ShapeError(
                f'expected "{shape.speaker}" of turn {index} to be one of {names}', found
            )
        if role == "system" and turn[shape.text] in empty:
            continue
        messages.append({"role": role, "content": _text(turn[shape.text], shape.text, index)})
    return messages


def _text(value: Any, key: str, index: int | None = None) -> str:
    place = f'"{key}"' + ("" if index is None else f" of turn {index}")
    if not isinstance(value, str):
        raise _ShapeError(f"expected a string at {place}", type(value).__name__)
    if not value.strip():
        raise _ShapeError(f"expected text at {place}", repr(value))
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise _ShapeError(f"expected valid Unicode at {place}", str(error)) from error
    return value


def _parse(line: bytes) -> Any:
    try:
        record = json.loads(line.decode())
    except UnicodeDecodeError as error:
        raise _ShapeError("expected UTF-8", str(error)) from error
    except (ValueError, RecursionError) as error:
        raise _ShapeError("expected valid JSON", f"{error} in {excerpt(line.decode())}") from error
    if not isinstance(record, dict | list):
        raise _ShapeError("expected a JSON object or list", excerpt(line.decode().strip()))
    return record


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    try:
        stream, raw = open_stream(path)
        with raw, stream:
            for number, line in enumerate(read_lines(stream), start=1):
                if not line.isspace():
                    yield number, line
    except (OSError, EOFError) as error:
        raise DataError(f"{path} cannot be read: {error}") from error
