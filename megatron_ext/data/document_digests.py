"""Digests of documents, by which data sets that share some are found.

A document's digest is an 8-byte BLAKE2b of its token ids as they are stored. That any two different
documents of 10^8 and 10^9 have the same one has a probability of 0.5%. A document of a few tokens, a
number or "Yes.", is no text that two data sets share: it has no digest.
"""

import hashlib
from collections.abc import Buffer

import numpy as np
from numpy.typing import NDArray

MIN_TOKENS = 16
# Kept in a manifest, as 20 KB of text. If two data sets share a fraction f of their documents taken
# together, about 1024 f of the shared ones are in both samples.
SAMPLED_DOCUMENTS = 1024


def has_digest(bounds: NDArray[np.int64], itemsize: int) -> NDArray[np.bool_]:
    """Whether each document, bool `[documents]`, is long enough; arguments as in `document_digests`."""
    return np.diff(bounds) >= MIN_TOKENS * itemsize


def document_digests(
    tokens: Buffer, bounds: NDArray[np.int64], *, itemsize: int
) -> NDArray[np.uint64]:
    """Digests of the documents of a run of tokens that have one.

    Args:
        tokens: Ids as stored.
        bounds: int64 `[documents + 1]`, where each document begins and ends, in bytes.
        itemsize: Bytes of a token.

    Returns:
        uint64, a digest for each document of at least `MIN_TOKENS`.
    """
    view = memoryview(tokens).cast("B")
    long = has_digest(bounds, itemsize)
    places = zip(bounds[:-1][long].tolist(), bounds[1:][long].tolist(), strict=True)
    digests = b"".join(
        hashlib.blake2b(view[start:end], digest_size=8).digest() for start, end in places
    )
    return np.frombuffer(digests, dtype=">u8").astype(np.uint64)


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
