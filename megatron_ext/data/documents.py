"""Reading documents from JSON lines, Parquet and plain text, in blocks of bounded size.

Reading is split in two, so that one reader feeds some 8 workers (more wait for it, see
docs/data_at_scale.md): `read_blocks` cuts the inputs into raw blocks in one process, and `parse_block`
turns a block into records in a worker. Order is that of the inputs throughout.
"""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO, Literal

from megatron_ext.data.compression import DamagedError, open_stream, read_lines, read_parts
from megatron_ext.data.inputs import InputFormat, format_of
from megatron_ext.data.records import BadRecord, Record, parse_json, take
from megatron_ext.exceptions import DataError

TextUnit = Literal["file", "line", "paragraph"]

# Raw bytes of a block: some 50 ms of a worker. gigatoken begins each with an empty cache of words.
BLOCK_BYTES = 2 << 20
_PARQUET_ROWS = 512
# A longer line or text is no document but a file of another format, of which memory would be full first.
_RECORD_BYTES = 1 << 30


@dataclass(frozen=True)
class Block:
    """A run of neighbouring raw records of one file, or small texts of several.

    Attributes:
        path: The file, or the first of several small texts.
        kind: How to parse `payload`: complete JSON lines, a `pyarrow.RecordBatch`, plain texts, or bad
            records that are known before they are parsed.
        payload: The records.
        first: Number of the first record, from 1: a line (JSON lines, text) or a row (Parquet).
        consumed: Bytes of the file as stored that this block accounts for, for progress.
        index: Number of the block over all inputs, from 0.
        lines: Line of each text, for plain text only.
        paths: File of each text, if they are of several.
    """

    path: str
    kind: Literal["jsonl", "parquet", "text", "bad"]
    payload: Any
    first: int
    consumed: int
    index: int = 0
    lines: tuple[int, ...] = ()
    paths: tuple[str, ...] = ()

    def file_of(self, text: str) -> str:
        """The file of one of the texts."""
        texts = zip(self.paths, self.payload, strict=True) if self.paths else ()
        return next((path for path, raw in texts if raw == text.encode()), self.path)


def read_blocks(
    paths: Sequence[Path],
    *,
    keys: Sequence[str],
    input_format: InputFormat = "auto",
    text_unit: TextUnit = "file",
    skip_broken: bool = False,
) -> Iterator[Block]:
    """Cuts files into blocks of about a MiB, holding one at a time.

    Args:
        paths: Files, from `find_inputs`.
        keys: Columns to take from Parquet.
        input_format: Format of all files, or by their names.
        text_unit: What is one document of a plain text: the file, each non-blank line, or each run
            of lines between blank ones.
        skip_broken: Whether a compressed file that ends early or is damaged gives the records before that
            place and then a bad one, in a block of kind `bad`, or an error.

    Raises:
        DataError: A file cannot be read or decompressed.
    """
    files = (
        _file_blocks(path, format_of(path, input_format=input_format), keys, text_unit, skip_broken)
        for path in paths
    )
    blocks = itertools.chain.from_iterable(files)
    for index, block in enumerate(_joined(blocks) if text_unit == "file" else blocks):
        yield replace(block, index=index)


def _file_blocks(
    path: Path, kind: InputFormat, keys: Sequence[str], unit: TextUnit, skip_broken: bool
) -> Iterator[Block]:
    told = 0
    try:
        if kind == "parquet":
            blocks = _parquet_blocks(path, keys)
        elif kind == "jsonl":
            blocks = _jsonl_blocks(path)
        else:
            blocks = _text_blocks(path, unit)
        for block in blocks:
            told += block.consumed
            yield block
    except (OSError, EOFError) as error:
        if not skip_broken or not isinstance(error, EOFError | DamagedError):
            raise DataError(f"{path} cannot be read: {error}") from error
        reason = "file ends early" if isinstance(error, EOFError) else "file is damaged"
        bad = BadRecord(str(path), reason, str(error))
        yield Block(str(path), "bad", [bad], 1, path.stat().st_size - told)


def _joined(blocks: Iterable[Block]) -> Iterator[Block]:
    """Joins the texts of neighbouring small files: a block takes a tokenizer 6 ms, however small it is."""
    waiting: list[Block] = []
    size = 0
    for block in blocks:
        if block.kind == "text":
            waiting.append(block)
            size += len(block.payload[0])
        if waiting and (block.kind != "text" or size >= BLOCK_BYTES):
            yield _join(waiting)
            waiting, size = [], 0
        if block.kind != "text":
            yield block
    if waiting:
        yield _join(waiting)


def _join(blocks: Sequence[Block]) -> Block:
    return replace(
        blocks[0],
        payload=[text for block in blocks for text in block.payload],
        consumed=sum(block.consumed for block in blocks),
        lines=tuple(line for block in blocks for line in block.lines),
        paths=tuple(block.path for block in blocks for _ in block.lines),
    )


def parse_block(block: Block, keys: Sequence[str]) -> Iterator[Record | BadRecord]:
    """Parses the records of a block, in order."""
    if block.kind == "jsonl":
        for number, line in json_lines(block):
            yield parse_json(line, f"{block.path}:{number}", keys)
    elif block.kind == "parquet":
        columns = [_values(block.payload.column(key)) for key in keys]
        for number, values in enumerate(zip(*columns, strict=True), start=block.first):
            where = f"{block.path}: row {number}"
            broken = next((value for value in values if isinstance(value, ValueError)), None)
            if broken is not None:
                yield BadRecord(where, "not UTF-8", str(broken))
            else:
                yield take(dict(zip(keys, values, strict=True)), where, keys)
    elif block.kind == "bad":
        yield from block.payload
    else:
        paths = block.paths or itertools.repeat(block.path)
        for path, number, raw in zip(paths, block.lines, block.payload, strict=False):
            where = f"{path}:{number}"
            try:
                yield take({keys[0]: raw.decode()}, where, keys[:1])
            except UnicodeDecodeError as error:
                yield BadRecord(where, "not UTF-8", str(error))


def json_lines(block: Block) -> Iterator[tuple[int, bytes]]:
    """Number and bytes of the lines of a block of JSON; blank ones, as at the end of files, are not."""
    for number, line in enumerate(block.payload.split(b"\n"), start=block.first):
        if line and not line.isspace():
            yield number, line


def _values(column: Any) -> list[Any]:
    """A column's values, an error in place of one that is not UTF-8; Parquet's writers need not look."""
    try:
        values: list[Any] = column.to_pylist()
    except UnicodeDecodeError:
        values = []
        for value in column:
            try:
                values.append(value.as_py())
            except UnicodeDecodeError as error:
                values.append(error)
    return values


def _jsonl_blocks(path: Path) -> Iterator[Block]:
    stream, raw = open_stream(path)
    with raw, stream:
        first, told = 1, 0
        pending: list[bytes] = []  # the start of a line that is longer than what was read
        for data in read_parts(stream, BLOCK_BYTES):
            end = data.rfind(b"\n")
            if end < 0:
                pending.append(data)
                _check_size(len(pending) * BLOCK_BYTES, f"{path}:{first}")
                continue
            payload = b"".join([*pending, data[:end]])
            pending = [data[end + 1 :]]
            position = raw.tell()
            yield Block(str(path), "jsonl", payload, first, position - told)
            first, told = first + payload.count(b"\n") + 1, position
        if last := b"".join(pending):
            yield Block(str(path), "jsonl", last, first, raw.tell() - told)


def _parquet_blocks(path: Path, keys: Sequence[str]) -> Iterator[Block]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    size = path.stat().st_size
    try:
        with pq.ParquetFile(path) as table:
            names = table.schema_arrow.names
            for key in keys:
                if names.count(key) != 1:
                    raise DataError(
                        f"{path}: expected one column {key!r}, found {', '.join(names)}"
                    )
            rows, first = max(table.metadata.num_rows, 1), 1
            for batch in table.iter_batches(
                batch_size=_rows_of_block(table.metadata, keys),
                columns=list(keys),
                use_threads=False,
            ):
                yield Block(str(path), "parquet", batch, first, size * batch.num_rows // rows)
                first += batch.num_rows
    except pa.ArrowException as error:
        raise DataError(f"{path} cannot be read as Parquet: {error}") from error


def _rows_of_block(metadata: Any, keys: Sequence[str]) -> int:
    """Rows that hold about `BLOCK_BYTES` of text: books take a thousand times the room of web pages."""
    groups = [metadata.row_group(i) for i in range(metadata.num_row_groups)]
    size = sum(
        column.total_uncompressed_size
        for group in groups
        for column in map(group.column, range(group.num_columns))
        if column.path_in_schema.partition(".")[0] in keys or column.path_in_schema in keys
    )
    return min(_PARQUET_ROWS, max(1, BLOCK_BYTES * metadata.num_rows // max(1, size)))


def _text_blocks(path: Path, unit: TextUnit) -> Iterator[Block]:
    stream, raw = open_stream(path)
    with raw, stream:
        if unit == "file":
            parts: list[bytes] = []
            for data in read_parts(stream, BLOCK_BYTES):
                parts.append(data)
                _check_size(len(parts) * BLOCK_BYTES, str(path))
            text = b"".join(parts)
            yield Block(str(path), "text", [text], 1, raw.tell(), lines=(1,))
            return
        told = size = 0
        texts: list[bytes] = []
        lines: list[int] = []
        broken: Exception | None = None
        try:
            for number, text in _split_text(stream, unit, path):
                texts.append(text)
                lines.append(number)
                size += len(text)
                if size >= BLOCK_BYTES:
                    consumed = raw.tell() - told
                    yield Block(str(path), "text", texts, lines[0], consumed, lines=tuple(lines))
                    told, size, texts, lines = raw.tell(), 0, [], []
        except (EOFError, DamagedError) as error:
            broken = error
        if texts:
            yield Block(str(path), "text", texts, lines[0], raw.tell() - told, lines=tuple(lines))
        if broken is not None:
            raise broken


def _check_size(size: int, where: str) -> None:
    if size > _RECORD_BYTES:
        raise DataError(
            f"{where}: expected a document of at most {_RECORD_BYTES / 2**30:g} GiB, found a longer one; "
            "--input-format, and --text-unit of preprocess_data.py, say what a document is"
        )


def _split_text(stream: BinaryIO, unit: TextUnit, path: Path) -> Iterator[tuple[int, bytes]]:
    """Yields the line number and the bytes of each unit, without its line end."""
    paragraph: list[bytes] = []
    number = size = 0
    for number, line in enumerate(read_lines(stream, _RECORD_BYTES + 1), start=1):
        _check_size(len(line), f"{path}:{number}")
        blank = not line.strip()
        if unit == "line" and not blank:
            yield number, line.rstrip(b"\r\n")
        elif unit == "paragraph" and not blank:
            size = size + len(line) if paragraph else len(line)
            paragraph.append(line)
            _check_size(size, f"{path}:{number - len(paragraph) + 1}")
        elif paragraph:
            yield number - len(paragraph), b"".join(paragraph).rstrip(b"\r\n")
            paragraph = []
    if paragraph:
        yield number - len(paragraph) + 1, b"".join(paragraph).rstrip(b"\r\n")
