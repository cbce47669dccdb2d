"""Digests of documents, and the samples of them."""

import hashlib

import numpy as np
import pytest

from megatron_ext.data.document_digests import (
    MIN_TOKENS,
    SAMPLED_DOCUMENTS,
    DocumentSample,
    document_digests,
    shared_in_samples,
)


def test_samples_are_comparable_whatever_the_size():
    """A full sample says nothing beyond its largest digest."""
    everything = [number * 2**50 for number in range(SAMPLED_DOCUMENTS * 8)]
    few = DocumentSample()
    few.add(np.array(everything[::100], dtype=np.uint64))
    many = DocumentSample()
    for start in range(0, len(everything), 1000):
        many.add(np.array(everything[start : start + 1000], dtype=np.uint64))
    assert many.smallest == everything[:SAMPLED_DOCUMENTS]
    in_range = len([d for d in few.smallest if d <= many.smallest[-1]])
    assert shared_in_samples(few.smallest, many.smallest) == (in_range, in_range)
    other = [digest + 1 for digest in few.smallest]
    assert shared_in_samples(other, many.smallest)[0] == 0


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_short_documents_have_no_digest(dtype):
    ids = np.arange(3 * MIN_TOKENS, dtype=dtype)
    size = ids.itemsize
    bounds = size * np.array([0, MIN_TOKENS - 1, 2 * MIN_TOKENS - 1, 2 * MIN_TOKENS - 1, len(ids)])

    def digest(start, end):
        return int.from_bytes(hashlib.blake2b(ids.tobytes()[start:end], digest_size=8).digest())

    long = [digest(bounds[1], bounds[2]), 0, digest(bounds[3], bounds[4])]
    found = document_digests(ids.tobytes(), bounds, dtype=ids.dtype, eod_id=None)
    assert found.tolist() == [0, *long]
    # Without the last id one is too short, and one the shorter; elsewhere the id is as any other.
    found = document_digests(ids.tobytes(), bounds, dtype=ids.dtype, eod_id=2 * MIN_TOKENS - 2)
    assert found.tolist() == [0, 0, 0, long[2]]
    found = document_digests(ids.tobytes(), bounds, dtype=ids.dtype, eod_id=int(ids[-1]))
    assert found.tolist() == [0, *long[:2], digest(bounds[3], bounds[4] - size)]
    # Twice, and nothing else; neither reaches into the document before.
    ids[-2:] = ids[bounds[0] // size : bounds[1] // size] = 7
    found = document_digests(ids.tobytes(), bounds, dtype=ids.dtype, eod_id=7)
    assert found.tolist() == [0, long[0], 0, 0]
    found = document_digests(ids.tobytes(), bounds[[0, 4]], dtype=ids.dtype, eod_id=7)
    assert found.tolist() == [digest(0, bounds[4] - 2 * size)]
