"""Documents that data sets share, against sets of tuples."""

import tracemalloc

import numpy as np
import pytest

from megatron_ext.data import read_digests
from megatron_ext.data.document_digests import MIN_TOKENS
from megatron_ext.data.read_digests import Digests, comparable
from megatron_ext.data.shared_documents import _PER_DOCUMENT, _distinct, _Known, find_overlaps
from megatron_ext.exceptions import DataError
from tests.helpers.text import write_dataset


def text(seed):
    random = np.random.default_rng(seed)
    return random.integers(0, 9, MIN_TOKENS + int(random.integers(0, 5))).tolist()


def drawn(seed):
    """Documents of which many are there several times, also elsewhere; some are too short to count."""
    random = np.random.default_rng(seed)
    return [text(i) if i < 30 else [1] * (i - 30) for i in random.integers(0, 35, 60).tolist()]


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """Four data sets on one side, three on the other: documents by prefix."""
    folder = tmp_path_factory.mktemp("sets")
    sides = {f"a{i}": drawn(i) for i in range(3)} | {"a3": [text(99), [1]]}
    sides |= {f"b{i}": drawn(10 + i) for i in range(2)} | {"b2": [text(98), [1]]}
    return {write_dataset(folder / name, documents): documents for name, documents in sides.items()}


def by_hand(first, second):
    known = {tuple(ids) for ids in first if len(ids) >= MIN_TOKENS}
    numbers = [number for number, ids in enumerate(second) if tuple(ids) in known]
    return len(numbers), len({tuple(second[number]) for number in numbers}), numbers[:5]


@pytest.mark.parametrize(
    ("settings", "block"),
    [({}, 1 << 25), ({"max_bytes": 3000}, 64), ({"max_bytes": 900}, 300), ({"workers": 2}, 1500)],
)
def test_shared_documents_are_counted_for_each_pair(sets, settings, block, monkeypatch):
    """Also in parts, over which no document counts twice, in blocks of any size, and by two processes."""
    monkeypatch.setattr(read_digests, "_BLOCK", block)
    monkeypatch.setattr(read_digests, "_ENTRIES", block)
    firsts, seconds = list(sets)[:4], list(sets)[4:]
    seen = []
    found = find_overlaps(
        firsts, seconds, progress=lambda read, total: seen.append((read, total)), **settings
    )
    expected = [[by_hand(sets[a], sets[b]) for b in seconds] for a in firsts]
    assert [
        [(x.documents, x.distinct, x.examples) for x in of_first] for of_first in found
    ] == expected
    assert {pair[0] > 0 for of_first in expected for pair in of_first} == {True, False}
    # Every data set was read once for each part, whatever the number of the others.
    size = sum(each.summary.size for each in comparable(list(sets), eod_id=None))
    parts = {None: 1, 3000: 3, 900: 8}[settings.get("max_bytes")]
    assert sum(read for read, _ in seen) == parts * size
    assert {total for _, total in seen} == {parts * size}


def test_the_type_of_the_ids_hides_no_shared_text(tmp_path):
    texts = [text(seed) for seed in range(20)]
    kinds = {"uint16": 20, "int32": 5, "int64": 8}
    prefixes = [
        write_dataset(tmp_path / dtype, [*texts[:k], [], [7]], dtype=np.dtype(dtype).type)
        for dtype, k in kinds.items()
    ]
    found = find_overlaps(prefixes, prefixes, eod_id=3)
    for of_first, a in zip(found, kinds.values(), strict=True):
        for overlap, b in zip(of_first, kinds.values(), strict=True):
            assert (overlap.documents, overlap.examples) == (min(a, b), [*range(5)])


def test_a_broken_index_to_compare_with_is_named(sets, tmp_path):
    broken = write_dataset(tmp_path / "broken", [text(seed) for seed in range(9)])
    index = bytearray((tmp_path / "broken.idx").read_bytes())
    at = 34 + 4 * 9 + 8 * 5  # where sequence 5 begins
    index[at : at + 8] = np.int64(10**9).tobytes()
    (tmp_path / "broken.idx").write_bytes(index)
    with pytest.raises(
        DataError, match=r"broken\.idx is broken: expected documents 0 to 8 one behind"
    ):
        find_overlaps(list(sets)[:1], [broken])


@pytest.mark.parametrize("owners", [1, 4])
def test_digests_take_the_memory_that_is_reckoned_with(owners):
    """Without the arrays that are given, which hold 8 bytes a document here and a block in a run."""
    count = 1 << 18
    values = np.random.default_rng(4).integers(1, 2**63, count, dtype=np.uint64)
    blocks = [Digests(0, 0, part, 0) for part in np.split(values, 256)]
    # A text that is there many times takes no more than once.
    again = [Digests(0, 0, np.full(1 << 14, 7, dtype=np.uint64), 0)] * 256
    tracemalloc.start()
    size = len(blocks) // owners
    known = _Known(
        [_distinct(blocks[i * size : (i + 1) * size] + again, 0, 1) for i in range(owners)]
    )
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(known._digests) == count + owners
    assert count * _PER_DOCUMENT / 2 < peak < count * _PER_DOCUMENT
