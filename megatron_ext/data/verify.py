"""Reads a tokenised data set from end to end and holds it against its index, its manifest and a vocabulary.

Memory does not grow with the data: tokens are read in blocks of 32 MB, the index is mapped.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_ext.data.document_digests import document_digests
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
# Entries of the index that are looked at, and bytes of a digest that memory is counted in, at a time.
_ENTRIES, _DIGEST = 1 << 20, 8

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


@dataclass(frozen=True)
class Overlap:
    """Documents that two data sets share.

    Attributes:
        documents: documents of the second that the first has as well.
        distinct: different documents among them.
        examples: numbers of some of them in the second.
    """

    documents: int
    distinct: int
    examples: list[int]


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
    _check_index(prefix, summary)
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


def _check_index(prefix: str | Path, summary: IndexSummary) -> None:
    """Sequences follow one another without a gap, and documents do."""
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
    with path.open("rb") as stream:
        for number in range(-(-path.stat().st_size // _BLOCK)):
            block = stream.read(_BLOCK)
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
    with idx_path(prefix).open("rb") as stream:
        while block := stream.read(_BLOCK):
            digest.update(block)
    return largest, digest.hexdigest()


def digests(
    prefix: str | Path,
    *,
    eod_id: int | None = None,
    dtype: np.dtype | None = None,
    advance: Advance = lambda _: None,
) -> Iterator[NDArray[np.uint64]]:
    """Digests of all documents in order, in parts; 0 for one too short to have one.

    Args:
        prefix: Path without `.bin` and `.idx`.
        eod_id: Id that may end a document and is no part of its text; None if there is none.
        dtype: Type, at least as wide as the stored one, in which ids are digested; None: that one.
        advance: Called with the bytes that were read since the last call.
    """
    summary = read_index_summary(prefix)
    _, offsets, boundaries = map_index(prefix, summary)
    total = summary.tokens * summary.dtype.itemsize
    first = 0
    with bin_path(prefix).open("rb") as stream:
        while first < summary.documents:
            part = boundaries[first : first + _ENTRIES + 1]
            inside = part < summary.sequences
            bounds = np.full(len(part), total, dtype=np.int64)
            bounds[inside] = offsets[part[inside]]
            fit = int(np.searchsorted(bounds, bounds[0] + _BLOCK, side="right")) - 1
            bounds = bounds[: max(1, fit) + 1]
            stream.seek(int(bounds[0]))
            block = stream.read(int(bounds[-1] - bounds[0]))
            tokens = np.frombuffer(block, summary.dtype).astype(dtype or summary.dtype, copy=False)
            places = (bounds - bounds[0]) // summary.dtype.itemsize * tokens.itemsize
            found = document_digests(tokens, places, dtype=tokens.dtype, eod_id=eod_id)
            yield found
            advance(len(block))
            first += len(found)


def find_overlap(
    first: str | Path,
    second: str | Path,
    *,
    max_bytes: int = 1 << 30,
    eod_id: int | None = None,
    advance: Advance = lambda _: None,
) -> Overlap:
    """Find the documents that two data sets share.

    The digests of the first are held in parts that fit the memory; both are read once for each.

    Args:
        first: Prefix; better the one with fewer documents.
        second: Prefix.
        max_bytes: Of memory for digests.
        eod_id: Id that ends documents where a data set has no manifest; None: the other's, if it has one.
        advance: Called with the bytes of the second that were read since the last call.

    Raises:
        DataError: a file is missing or broken, or the two were made with different tokenizers.
    """
    manifests = [read_manifest(prefix) for prefix in (first, second)]
    if len({each.tokenizer_digest for each in manifests if each is not None}) > 1:
        raise DataError(
            f"{manifest_path(second)}: expected data of the tokenizer of {first}, so that ids can be "
            "compared, found another tokenizer's"
        )
    summaries = [read_index_summary(prefix) for prefix in (first, second)]
    # Stock Megatron-LM and other tools may have chosen another type for the same ids.
    dtype = np.promote_types(*(each.dtype for each in summaries))
    if eod_id is None:
        eod_id = next((each.eod_id for each in manifests if each is not None), None)
    eods = [eod_id if each is None else each.eod_id for each in manifests]
    documents, distinct, examples = 0, 0, list[int]()
    parts = -(-summaries[0].documents * 3 * _DIGEST // max_bytes)
    for remainder in range(parts):
        known = _part(digests(first, eod_id=eods[0], dtype=dtype), remainder, parts)
        if not len(known):
            continue
        number, shared = 0, np.zeros(len(known), dtype=bool)
        for part in digests(second, eod_id=eods[1], dtype=dtype, advance=advance):
            places = np.minimum(np.searchsorted(known, part), len(known) - 1)
            hits = known[places] == part
            shared[places[hits]] = True
            examples += (number + np.flatnonzero(hits)).tolist()[: max(0, 5 - len(examples))]
            documents += int(hits.sum())
            number += len(part)
        distinct += int(shared.sum())
    return Overlap(documents, distinct, examples)


def _part(stream: Iterator[NDArray[np.uint64]], remainder: int, parts: int) -> NDArray[np.uint64]:
    """Sorted, distinct digests, one in `parts`: by their value, so that none is in two parts."""
    chosen = [part[(part % parts == remainder) & (part != 0)] for part in stream]
    return np.unique(np.concatenate(chosen))
