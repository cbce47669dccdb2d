"""Lines of prompts in, lines of completions out."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from megatron_ext.data.atomic import write_atomically
from megatron_ext.data.chat import check_question
from megatron_ext.evaluation.completion import Codec, Generator
from megatron_ext.evaluation.journal import Journal
from megatron_ext.evaluation.sampling import Request, Sampling
from megatron_ext.exceptions import ConfigError, DataError

Record = dict[str, Any]


def read_records(path: Path) -> list[Record]:
    """Read JSON lines of objects.

    Raises:
        DataError: the file cannot be read, is empty, or a line is no object; names the line.
    """
    records: list[Record] = []
    try:
        # Not `splitlines`: JSON writes U+2028 and its like as they are, in the middle of a line.
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            json.dumps(record, ensure_ascii=False).encode()
        except (json.JSONDecodeError, RecursionError) as error:
            raise DataError(f"{path}:{number}: expected JSON, {error}") from error
        except UnicodeEncodeError as error:  # half of a pair, as \ud800
            raise DataError(f"{path}:{number}: expected valid Unicode, {error}") from error
        if not isinstance(record, dict):
            raise DataError(f"{path}:{number}: expected an object, found {type(record).__name__}")
        records.append(record)
    if not records:
        raise DataError(f"{path}: expected at least one line, found none")
    return records


def read_prompts(path: Path) -> list[Record]:
    """Read lines that have a prompt or messages.

    Raises:
        DataError: a line has neither, or both, or its messages cannot be answered; names it, and the turn.
    """
    records = read_records(path)
    for number, record in enumerate(records, start=1):
        prompt, turns = record.get("prompt"), record.get("messages")
        if isinstance(prompt, str) and turns is None:
            continue
        if prompt is None and turns is not None:
            try:
                check_question(turns)
            except DataError as error:
                raise DataError(f"{path}: record {number}: {error}") from error
            continue
        raise DataError(
            f'{path}: record {number}: expected {{"prompt": text}} or {{"messages": [{{"role", '
            f'"content"}}, ...]}}, found keys {sorted(record)}'
        )
    return records


def requests_of(records: Sequence[Record], codec: Codec, sampling: Sampling) -> list[Request]:
    """A request for each record, named by its place.

    Raises:
        DataError: the chat template refuses the turns; names the record.
    """
    requests = []
    for number, record in enumerate(records, start=1):
        try:
            if record.get("prompt") is not None:
                requests.append(codec.prompt(str(number), record["prompt"], sampling))
            else:
                requests.append(codec.chat(str(number), record["messages"], sampling))
        except DataError as error:
            raise DataError(f"record {number}: {error}") from error
    return requests


def check_name(name: str) -> None:
    """Refuse a model's name that would lead out of the folder of its files.

    Raises:
        ConfigError: it is a path.
    """
    if not name or name in (".", "..") or os.sep in name:
        raise ConfigError(f"--name: expected a name without {os.sep} for files, found {name!r}")


def open_journal(
    generator: Generator, output: Path, settings: Mapping[str, Any]
) -> AbstractContextManager[Journal | None]:
    """The journal on the rank that writes, ``None`` on the others."""
    return Journal(output, settings=settings) if generator.is_writer else nullcontext()


def json_lines(records: Sequence[Record]) -> bytes:
    """JSON lines."""
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records).encode()


def write_records(path: Path, records: Sequence[Record], *, overwrite: bool) -> None:
    """Write JSON lines, all or none."""
    write_atomically(path, json_lines(records), overwrite=overwrite)
