"""Reads a tokenised data set from end to end and holds it against its index, its manifest and a vocabulary.

Memory does not grow with the data: tokens are read in blocks of 32 MB, the index is mapped.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from megatron_ext.data.indexed import (
    IndexSummary,
    bin_path,
    idx_path,
    map_index,
    read_index_summary,
)
from megatron_ext.data.manifest import check_tokenizer, manifest_path, read_manifest
from megatron_ext.exceptions import DataError

_BLOCK = 1 << 25
_ENTRIES = 1 << 20  # of the index, looked at at a time

Advance = Callable[[int], Any]


@dataclass(frozen=True)
class Verified:
    """What was found in a data set without fault.

    Attributes:
        summary: its size.
        largest: its largest token id.
        has_digest: whether a manifest with a digest of the content was there to compare with.
    """

    summary: IndexSummary
    largest: int
    has_digest: bool


def verify(
    prefix: str | Path,
    *,
    vocab_size: int | None = None,
    tokenizer_digest: str | None = None,
    advance: Advance = lambda _: None,
) -> Verified:
    """Check all of a data set.

    Args:
        prefix: Path without `.bin` and `.idx`.
        vocab_size: Pieces of the tokenizer that it shall fit; None: those that its manifest names.
        tokenizer_digest: Of the tokenizer that it shall be made with; None compares none.
        advance: Called with the bytes that were read since the last call.

    Returns:
        What was found.

    Raises:
        DataError: Names the file and the place of the first fault.
    """
    summary = read_index_summary(prefix)
    check_index(prefix, summary)
    manifest = read_manifest(prefix)
    path = manifest_path(prefix)
    if manifest is not None:
        vocab_size = manifest.vocab_size if vocab_size is None else vocab_size
        check_tokenizer(path, manifest, vocab_size=vocab_size, tokenizer_digest=tokenizer_digest)
    largest, digest = _read_tokens(prefix, summary, vocab_size, advance)
    if manifest is None:
        return Verified(summary, largest, has_digest=False)
    _expect(path, "documents", summary.documents, manifest.documents)
    _expect(path, "sequences", summary.sequences, manifest.sequences)
    _expect(path, "tokens", summary.tokens, manifest.tokens)
    _expect(path, "dtype", summary.dtype.name, manifest.dtype)
    _expect(path, "max_token_id", largest, manifest.max_token_id)
    if manifest.content_digest is not None:
        _expect(path, "content_digest", digest, manifest.content_digest)
    return Verified(summary, largest, has_digest=manifest.content_digest is not None)


def _expect(path: Path, name: str, expected: object, found: object) -> None:
    if expected != found:
        raise DataError(f"{path}: expected {name} {expected}, as the data have it, found {found}")


def check_index(prefix: str | Path, summary: IndexSummary) -> None:
    """Check all of an index: sequences follow one another without a gap, and documents do.

    Args:
        prefix: Path without `.bin` and `.idx`.
        summary: From `read_index_summary`.

    Raises:
        DataError: Names the file and the first sequence or document that does not.
    """
    path, size = idx_path(prefix), summary.dtype.itemsize
    lengths, offsets, boundaries = map_index(prefix, summary)
    position = 0
    for start in range(0, len(lengths), _ENTRIES):
        part = lengths[start : start + _ENTRIES].astype(np.int64)
        ends = position + np.cumsum(part) * size
        wrong = (offsets[start : start + _ENTRIES] != ends - part * size) | (part <= 0)
        if wrong.any():
            first = int(np.argmax(wrong))
            raise DataError(
                f"{path} is broken: sequence {start + first} has {part[first]} tokens from byte "
                f"{offsets[start + first]}, expected one or more from byte "
                f"{ends[first] - part[first] * size}"
            )
        position = int(ends[-1])
    previous = 0
    for start in range(0, len(boundaries), _ENTRIES):
        part = boundaries[start : start + _ENTRIES]
        wrong = np.diff(part, prepend=previous) < 0
        if wrong.any() or (start == 0 and part[0] != 0):
            first = int(np.argmax(wrong))
            raise DataError(
                f"{path} is broken: document {start + first} begins before the last one"
            )
        previous = int(part[-1])


def _read_tokens(
    prefix: str | Path, summary: IndexSummary, vocab_size: int | None, advance: Advance
) -> tuple[int, str]:
    """Largest id and digest of the content."""
    path, digest, largest = bin_path(prefix), sha256(), 0
    for number, block in enumerate(file_blocks(path, _BLOCK)):
        digest.update(block)
        ids = np.frombuffer(block, dtype=summary.dtype)
        top, bottom = int(ids.max()), int(ids.min())
        largest = max(largest, top)
        if bottom < 0 or (vocab_size is not None and top >= vocab_size):
            wrong = (ids < 0) | (ids >= (vocab_size or 2**63))
            first = int(np.argmax(wrong))
            place = number * (_BLOCK // summary.dtype.itemsize) + first
            raise DataError(
                f"{path}: expected ids from 0 to {vocab_size} - 1, found {ids[first]} at token {place}"
            )
        advance(len(block))
    for block in file_blocks(idx_path(prefix), _BLOCK):
        digest.update(block)
    return largest, digest.hexdigest()


def file_blocks(path: Path, size: int) -> Iterator[bytes]:
    """The content of a file, at most so many bytes at a time.

    Raises:
        DataError: It cannot be read; what a disk reports names no file.
    """
    try:
        with path.open("rb") as stream:
            while block := stream.read(size):
                yield block
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error}") from error
