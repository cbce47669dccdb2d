"""Documents that are copies of earlier ones, against a dictionary of texts."""

import tracemalloc

import numpy as np
import pytest

from megatron_ext.data import duplicates, read_digests
from megatron_ext.data.document_digests import MIN_TOKENS
from megatron_ext.data.duplicates import find_duplicates
from megatron_ext.data.read_digests import Digests
from megatron_ext.exceptions import ConfigError, DataError
from tests.helpers.text import write_dataset
from tests.unit.test_shared_documents import drawn, text
from tools import verify_data


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sets")
    sides = {"once": [text(i) for i in range(90, 95)]} | {f"s{i}": drawn(i) for i in range(3)}
    return {write_dataset(folder / name, documents): documents for name, documents in sides.items()}


def by_hand(sets):
    """Copies, their tokens, those of other data sets' texts, and the first five."""
    first, result = {}, []
    for prefix, documents in sets.items():
        copies = []
        for number, ids in enumerate(documents):
            if len(ids) >= MIN_TOKENS:
                origin = first.setdefault(tuple(ids), (prefix, number))
                copies += [(number, *origin)] if origin != (prefix, number) else []
        tokens = sum(len(documents[number]) for number, *_ in copies)
        elsewhere = sum(origin != prefix for _, origin, _ in copies)
        result.append((len(copies), tokens, elsewhere, copies[:5]))
    return result


@pytest.mark.parametrize(
    ("settings", "block", "batch"),
    [({}, 1 << 25, 1), ({}, 100, 1 << 16), ({"max_bytes": 900}, 300, 7), ({"workers": 2}, 1500, 9)],
)
def test_copies_are_counted_within_and_across_data_sets(sets, settings, block, batch, monkeypatch):
    """Also in parts, in blocks and batches of any size, and by two processes."""
    monkeypatch.setattr(read_digests, "_BLOCK", block)
    monkeypatch.setattr(duplicates, "_BATCH", batch)
    found = find_duplicates(list(sets), **settings)
    expected = by_hand(sets)
    assert [(x.documents, x.tokens, x.elsewhere, x.examples) for x in found] == expected
    assert expected[0] == (0, 0, 0, [])
    assert 0 < expected[2][2] < expected[2][0]


def test_first_documents_take_the_memory_that_is_reckoned_with(monkeypatch):
    """Also where a text is there many times: it takes no more than once."""
    count = 1 << 18
    values = np.random.default_rng(4).integers(1, 2**63, count, dtype=np.uint64)
    parts = [*np.split(values, 256), *[np.full(1 << 14, 7, dtype=np.uint64)] * 256]
    places = np.cumsum([0, *map(len, parts)])
    blocks = [Digests(0, int(at), part, 0) for at, part in zip(places[:-1], parts, strict=True)]
    seen, copies = duplicates._Seen(), 0
    monkeypatch.setattr(duplicates, "_BATCH", 1 << 12)
    tracemalloc.start()
    for batch, numbers in duplicates._batches(blocks, places[[0, -1]], 0, 1, seen):
        copies += int((seen.first(batch, numbers) != numbers).sum())
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert (len(seen), copies) == (count + 1, (1 << 22) - 1)
    limit = count * duplicates._PER_DOCUMENT
    assert limit / 2 < peak < limit


def test_the_tool_names_copies(sets, tmp_path, monkeypatch, capsys):
    def tool(*words):
        monkeypatch.setattr("sys.argv", ["verify_data.py", *map(str, words), "--duplicates"])
        verify_data.main()
        return capsys.readouterr().out

    once = next(iter(sets))
    assert tool(once).splitlines()[-1] == f"ok  {once}: no document is a copy of an earlier one"
    twice = write_dataset(tmp_path / "twice", [text(1), [5], text(90), text(1), [5]])
    with pytest.raises(DataError, match=r"^1 checks failed"):
        tool(once, twice)
    share = 100 * (len(text(90)) + len(text(1))) / (len(text(90)) + 2 * len(text(1)) + 2)
    assert capsys.readouterr().out.splitlines()[-1] == (
        f"BAD {twice}: 2 of 5 documents, with {share:.2f}% of the tokens, are copies of earlier ones, "
        f"1 of them of other data sets', numbers 2 (= 0 of {once}), 3 (= 0) among them"
    )
    with pytest.raises(ConfigError, match=r"^--duplicates: expected each data set once"):
        tool(once, f"{once}.idx")
