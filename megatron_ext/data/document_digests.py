"""Digests of documents, by which data sets that share some are found.

A document's digest is an 8-byte BLAKE2b of its token ids as they are stored, without the end-of-document
ids at its end (at most two), which one data set may have and the other not. That any two different
documents of 10^8 and 10^9 have the same one has a probability of 0.5%. A document of a few tokens, a number
or "Yes.", is no text that two data sets share: it has no digest.
"""

import hashlib
from collections.abc import Buffer

import numpy as np
from numpy.typing import NDArray

MIN_TOKENS = 16
# Kept in a manifest, as 20 KB of text. If two data sets share a fraction f of their documents taken
# together, about 1024 f of the shared ones are in both samples.
SAMPLED_DOCUMENTS = 1024


def document_digests(
    tokens: Buffer, bounds: NDArray[np.int64], *, dtype: np.dtype, eod_id: int | None
) -> NDArray[np.uint64]:
    """Digests of the documents of a run of tokens.

    Args:
        tokens: Ids as stored.
        bounds: int64 `[documents + 1]`, where each document begins and ends, in bytes.
        dtype: Type of the tokens.
        eod_id: Id that may end a document and is no part of its text; None if there is none.

    Returns:
        uint64 `[documents]`, 0 for one of fewer than `MIN_TOKENS`.
    """
    view = memoryview(tokens).cast("B")
    starts, ends = bounds[:-1], bounds[1:].copy()
    if eod_id is not None:
        ids = np.frombuffer(view, dtype)
        for _ in range(2):  # a tokenizer's own template may have put one there already
            filled = np.flatnonzero(ends > starts)
            last = ids[ends[filled] // dtype.itemsize - 1]
            ends[filled[last == eod_id]] -= dtype.itemsize
    long = ends - starts >= MIN_TOKENS * dtype.itemsize
    places = zip(starts[long].tolist(), ends[long].tolist(), strict=True)
    found = b"".join(
        hashlib.blake2b(view[start:end], digest_size=8).digest() for start, end in places
    )
    digests = np.zeros(len(starts), dtype=np.uint64)
    digests[long] = np.frombuffer(found, dtype=">u8")
    return digests


class DocumentSample:
    """The smallest digests that it was given, which is a sample that any two data sets draw alike."""

    def __init__(self) -> None:
        self._kept = np.empty(0, dtype=np.uint64)

    @property
    def smallest(self) -> list[int]:
        """The digests, ascending, at most `SAMPLED_DOCUMENTS`."""
        return [int(digest) for digest in self._kept]

    def add(self, digests: NDArray[np.uint64]) -> None:
        """Take further digests into account."""
        if len(self._kept) == SAMPLED_DOCUMENTS:
            digests = digests[digests < self._kept[-1]]
        if len(digests):
            self._kept = np.unique(np.concatenate((self._kept, digests)))[:SAMPLED_DOCUMENTS]


def shared_in_samples(first: list[int], second: list[int]) -> tuple[int, int]:
    """Compare two samples.

    Args:
        first: Digests of one data set, ascending, as `DocumentSample.smallest` gives them.
        second: Of the other.

    Returns:
        Digests that both have, and the smaller number of them that could be compared: beyond the
        largest digest of a full sample, a missing one says nothing.
    """
    full = [sample[-1] for sample in (first, second) if len(sample) == SAMPLED_DOCUMENTS]
    end = min(full, default=2**64)
    known = [{digest for digest in sample if digest <= end} for sample in (first, second)]
    return len(known[0] & known[1]), min(map(len, known))
