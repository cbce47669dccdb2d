"""Questions of benchmarks in tokenised data: what is found, against a search by tuples of tokens."""

import numpy as np
import pytest

from megatron_ext.data import contamination
from megatron_ext.data.contamination import RUN, read_texts, shares_in
from megatron_ext.data.indexed import IndexedWriter, bin_path, idx_path
from megatron_ext.exceptions import DataError


def test_shares_of_texts_are_those_of_a_search_token_by_token(tmp_path, monkeypatch):
    monkeypatch.setattr(contamination, "_BLOCK", 50)  # runs cross the ends of blocks
    rng = np.random.default_rng(4)
    data = rng.integers(0, 400, 4000)
    prefix = tmp_path / "data"
    with bin_path(prefix).open("wb") as tokens, idx_path(prefix).open("wb") as index:
        writer = IndexedWriter(tokens, index, np.dtype(np.uint16))
        lengths, documents = np.full(40, 100, np.int32), np.ones(40, np.int32)
        stored = data.astype(np.uint16).tobytes()
        writer.append(stored, sequence_lengths=lengths, document_sequences=documents)
        writer.finish()
    texts = [data[:0], data[: RUN - 1], data[len(data) - RUN :]]
    for start in rng.integers(0, len(data) - 100, 60):
        text = data[start : start + rng.integers(RUN, 60)].copy()
        for place in rng.integers(0, len(text), rng.integers(0, 5)):
            text[place] = rng.integers(0, 400)  # most of these break a run
        texts.append(text)
    # One that is nowhere although all its tokens, and their sum in any order, are.
    texts.append(data[RUN - 1 :: -1].copy())
    runs = {tuple(data[i : i + RUN]) for i in range(len(data) - RUN + 1)}
    found = shares_in(prefix, texts, vocab_size=400)
    for text, share in zip(texts, found, strict=True):
        seen = np.zeros(len(text), dtype=bool)
        for i in range(len(text) - RUN + 1):
            seen[i : i + RUN] |= tuple(text[i : i + RUN]) in runs
        assert np.isnan(share) if len(text) < RUN else share == seen.mean()
    assert np.isnan(found[:2]).all()
    assert found[2] == 1
    assert found[-1] == 0
    assert len(np.unique(found[3:])) > 10


@pytest.mark.parametrize("content", ["", "\n", '{"question": []}\n'])
def test_a_benchmark_without_texts_is_no_clean_one(content, tmp_path):
    path = tmp_path / "empty.jsonl"
    path.write_text(content)
    with pytest.raises(DataError) as refused:
        read_texts(path, ["question"])
    assert str(refused.value) == f"--benchmark {path}: expected texts at question, found none"
