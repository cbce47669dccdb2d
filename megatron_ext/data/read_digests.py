"""The digests of all documents of data sets, read by several processes, in the order of the documents.

Processes take spans of documents of about 32 MB, whatever data set they are in, so one large data set keeps
all of them busy. Of 2 KB of tokens 8 bytes come back: the process that asks for them only looks them up.
"""

from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
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
from megatron_ext.data.manifest import Manifest, manifest_path, read_manifest
from megatron_ext.data.workers import in_order, start_worker
from megatron_ext.exceptions import DataError

_BLOCK = 1 << 25
_ENTRIES = 1 << 20  # of the index, looked at at a time

# Called with the bytes that were read since the last call, and those that will have been read in the end.
ShowProgress = Callable[[int, int], Any]


@dataclass(frozen=True)
class Comparable:
    """A data set whose documents are compared with others.

    Attributes:
        prefix: Path without `.bin` and `.idx`.
        summary: Its size.
        eod_id: Id that may end a document and is no part of its text; None if there is none.
        dtype: Type, at least as wide as the stored one, in which ids are digested.
    """

    prefix: str
    summary: IndexSummary
    eod_id: int | None
    dtype: np.dtype


@dataclass(frozen=True)
class Digests:
    """Those of a span of documents.

    Attributes:
        place: Of the data set, among those that are read.
        first: Number of the first document.
        values: uint64 `[documents]`, 0 for one that is too short to have one.
        size: Bytes that were read.
    """

    place: int
    first: int
    values: NDArray[np.uint64]
    size: int


@dataclass(frozen=True)
class _Span:
    """Documents `first` to `last`, without the last, of the data set at a place."""

    data: Comparable
    place: int
    first: int
    last: int


def check_tokenizers(prefixes: Sequence[str | Path]) -> list[Manifest | None]:
    """Check that ids of data sets mean the same; one without a manifest is taken to fit.

    Returns:
        The manifests.

    Raises:
        DataError: A manifest is unreadable, or names another tokenizer than the first one or other ids that
            it puts before texts: documents have these too, so that no two would be the same.
    """
    known: tuple[str | Path, str] | None = None
    manifests = [read_manifest(prefix) for prefix in prefixes]
    starts = [None if each is None else each.before_text for each in manifests]
    if different := different_starts(prefixes, starts):
        raise DataError(different)
    for prefix, manifest in zip(prefixes, manifests, strict=True):
        if manifest is None:
            continue
        known = known or (prefix, manifest.tokenizer_digest)
        if manifest.tokenizer_digest != known[1]:
            raise DataError(
                f"{manifest_path(prefix)}: expected data of the tokenizer of {known[0]}, so that ids can be "
                "compared, found another tokenizer's"
            )
    return manifests


def different_starts(
    prefixes: Sequence[str | Path], starts: Sequence[list[int] | None]
) -> str | None:
    """What to say of the first data set whose texts begin otherwise than the others'; None if there is none.

    What a tokenizer puts behind texts is an end-of-document id, without which documents are compared.

    Args:
        prefixes: of the data sets.
        starts: what the manifest of each calls `before_text`; None where that is not known.
    """
    known: tuple[str | Path, list[int]] | None = None
    for prefix, found in zip(prefixes, starts, strict=True):
        if found is None:
            continue
        known = known or (prefix, found)
        if found != known[1]:
            return (
                f"{manifest_path(prefix)}: expected ids {known[1]} before each text as in {known[0]}, found "
                f"{found}: no document of the one is the same as one of the other"
            )
    return None


def comparable(prefixes: Sequence[str | Path], *, eod_id: int | None) -> list[Comparable]:
    """Look at data sets whose documents are to be compared.

    Args:
        prefixes: Paths without `.bin` and `.idx`.
        eod_id: Id that ends documents where a data set has no manifest; None: the others', if one has one.

    Raises:
        DataError: A file is missing or broken, or two were made with different tokenizers.
    """
    manifests = check_tokenizers(prefixes)
    summaries = [read_index_summary(prefix) for prefix in prefixes]
    if eod_id is None:
        eod_id = next((each.eod_id for each in manifests if each is not None), None)
    eods = [eod_id if each is None else each.eod_id for each in manifests]
    # Stock Megatron-LM and other tools may have chosen another type for the same ids.
    dtype = np.result_type(*(summary.dtype for summary in summaries))
    return [
        Comparable(str(prefix), summary, eod, dtype)
        for prefix, summary, eod in zip(prefixes, summaries, eods, strict=True)
    ]


def read_digests(
    sets: Sequence[Comparable], *, workers: int, progress: ShowProgress = lambda *_: None
) -> Generator[Digests]:
    """Digest all documents of data sets; each data set gives at least one result.

    Args:
        sets: Read in this order; one may be named several times.
        workers: Processes, no more than there are 32 MB to read; 1 means this one.
        progress: See `ShowProgress`.

    Raises:
        DataError: An index is broken, or a worker died.
    """
    total = sum(each.summary.size for each in sets)
    workers = min(workers, total // _BLOCK + 1)
    spans = (span for place, data in enumerate(sets) for span in _spans(data, place))
    results: Iterable[Digests]
    if workers == 1:
        results = map(_digest, spans)
    else:
        results = in_order(
            _digest,
            spans,
            workers=workers,
            initializer=start_worker,
            describe=lambda span: f"{span.data.prefix} from document {span.first}",
        )
    for found in results:
        yield found
        progress(found.size, total)


def count_tokens(data: Comparable, numbers: NDArray[np.int64]) -> NDArray[np.int64]:
    """Tokens of some documents, an end-of-document id included."""
    _, offsets, boundaries = map_index(data.prefix, data.summary)
    begins, ends = (_begins(data, offsets, boundaries[at]) for at in (numbers, numbers + 1))
    return (ends - begins) // data.summary.dtype.itemsize


def _spans(data: Comparable, place: int) -> Iterator[_Span]:
    """Of about a block each; a longer document is a span of its own."""
    documents = data.summary.documents
    for start in range(0, documents, _ENTRIES):
        bounds = _bounds(data, start, min(documents, start + _ENTRIES))
        first, end = 0, len(bounds) - 1
        while first < end:
            fit = int(np.searchsorted(bounds, bounds[first] + _BLOCK, side="right")) - 1
            last = max(first + 1, fit)
            yield _Span(data, place, start + first, start + last)
            first = last


def _bounds(data: Comparable, first: int, last: int) -> NDArray[np.int64]:
    """Where documents begin, and the last of them ends, in bytes."""
    _, offsets, boundaries = map_index(data.prefix, data.summary)
    bounds = _begins(data, offsets, boundaries[first : last + 1])
    if (np.diff(bounds, prepend=0, append=data.summary.size) < 0).any():
        raise DataError(
            f"{idx_path(data.prefix)} is broken: expected documents {first} to {last - 1} one behind the "
            "other, found one that begins before the one before it"
        )
    return bounds


def _begins(
    data: Comparable, offsets: NDArray[np.int64], sequences: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Where sequences begin, in bytes; what is behind the last one begins at the end."""
    inside = sequences < data.summary.sequences
    begins = np.full(len(sequences), data.summary.size, dtype=np.int64)
    begins[inside] = offsets[sequences[inside]]
    return begins


def _digest(span: _Span) -> Digests:
    data, stored = span.data, span.data.summary.dtype
    bounds = _bounds(data, span.first, span.last)
    with bin_path(data.prefix).open("rb") as stream:
        stream.seek(int(bounds[0]))
        block = stream.read(int(bounds[-1] - bounds[0]))
    tokens = np.frombuffer(block, stored).astype(data.dtype, copy=False)
    places = (bounds - bounds[0]) // stored.itemsize * tokens.itemsize
    values = document_digests(tokens, places, dtype=tokens.dtype, eod_id=data.eod_id)
    return Digests(span.place, span.first, values, len(block))
