"""Text that is tokenised again under the same prefix never meets the indices of the text before."""

import os
from pathlib import Path

import numpy as np
import pytest
from megatron.core.datasets.gpt_dataset import GPTDataset

from megatron_ext.data.manifest import Manifest, write_manifest
from megatron_ext.data.sourced import SourcedGPTDataset, content_key
from tests.helpers.gpt_datasets import SEQUENCE, FakeTokenizer, dataset, documents, files
from tests.helpers.text import write_dataset


def samples(of, prefix, cache):
    """Tokens of one epoch."""
    made = dataset(of, prefix, cache)
    return np.stack([made[i]["tokens"].numpy() for i in range(100)]), made


def again(of, tmp_path):
    """Samples of retokenised data: with the cache that the first data left, and with an empty one."""
    prefix = write_dataset(tmp_path / "d", documents(1))
    first, _ = samples(of, prefix, tmp_path / "cache")
    write_dataset(tmp_path / "new", documents(2))
    for suffix in (".bin", ".idx"):
        os.replace(tmp_path / f"new{suffix}", f"{prefix}{suffix}")
    cached, _ = samples(of, prefix, tmp_path / "cache")
    fresh, _ = samples(of, prefix, tmp_path / "empty")
    assert not np.array_equal(first, fresh)
    return cached, fresh


def test_megatron_alone_takes_the_indices_of_other_data(tmp_path):
    """Documents are cut where those of the data before ended: samples of another length, or other text."""
    with pytest.raises(IndexError):
        again(GPTDataset, tmp_path)


def test_retokenised_data_have_indices_of_their_own(tmp_path):
    cached, fresh = again(SourcedGPTDataset, tmp_path)
    assert np.array_equal(cached, fresh)


def test_the_same_data_are_indexed_once(tmp_path):
    prefix = write_dataset(tmp_path / "d", documents(1))
    first, _ = samples(SourcedGPTDataset, prefix, tmp_path / "cache")
    before = files(tmp_path / "cache")
    second, _ = samples(SourcedGPTDataset, prefix, tmp_path / "cache")
    assert np.array_equal(first, second)
    assert len(before) == 4
    assert files(tmp_path / "cache") == before
    stock, _ = samples(GPTDataset, prefix, tmp_path / "stock")
    assert np.array_equal(first, stock)


def test_a_sample_says_where_it_comes_from(tmp_path):
    prefix = write_dataset(tmp_path / "d", documents(1))
    tokens, made = samples(SourcedGPTDataset, prefix, tmp_path / "cache")
    for index in (0, 57):
        source = made[index]["source"]
        head, _, rest = source.partition(" (documents ")
        assert head == f"sample {index} of {prefix}"
        named = [int(number) for number in rest.rstrip(")").split(",")]
        ids = np.concatenate([documents(1)[number] for number in named])
        assert set(tokens[index].tolist()) <= set(ids.tolist())


@pytest.mark.parametrize("of", [GPTDataset, SourcedGPTDataset])
def test_the_padding_of_the_first_sample_is_that_sample_s_alone(of, tmp_path):
    """What a rank reads first must not decide which tokens count in all that it reads later."""
    ids = [np.where(each % 7 == 0, FakeTokenizer.pad, each) for each in documents(1)]
    made = dataset(of, write_dataset(tmp_path / "d", ids), tmp_path / "cache")
    for index in range(5):
        sample = made[index]
        counted = int((sample["labels"] != 0).sum())  # where padding was Megatron puts a 0
        assert 0 < counted < SEQUENCE
        # Megatron alone counts ever fewer.
        assert (int(sample["loss_mask"].sum()) == counted) == (of is SourcedGPTDataset or not index)


def test_the_key_is_the_manifests_digest_where_there_is_one(tmp_path):
    prefix = write_dataset(tmp_path / "d", documents(1))
    without = content_key(prefix)
    texts = ("tokenizer_type", "tokenizer_model", "tokenizer_digest", "dtype", "backend")
    counts = ("vocab_size", "documents", "sequences", "tokens", "max_token_id")
    fields = dict.fromkeys(texts, "x") | dict.fromkeys(counts, 1)
    fields |= {"eod_id": None, "append_eod": True, "skipped": {}, "sources": []}
    write_manifest(prefix, Manifest(**fields, content_digest="abc"))
    assert content_key(prefix) == "abc" != without
    Path(f"{prefix}.manifest.json").unlink()
    assert content_key(prefix) == without
    os.utime(f"{prefix}.idx", ns=(1, 1))
    assert content_key(prefix) == without, "a copy on another node's disk has another date"
    assert content_key(None) is content_key("s3://bucket/prefix") is None


@pytest.mark.parametrize("part", [".bin", ".idx"])
def test_the_key_sees_either_file(tmp_path, part):
    prefix = write_dataset(tmp_path / "d", documents(1))
    before, times = content_key(prefix), os.stat(f"{prefix}.idx")
    with open(f"{prefix}{part}", "r+b") as stream:
        if part == ".bin":
            stream.seek(0, os.SEEK_END)
        stream.write(b"12")
    os.utime(f"{prefix}.idx", ns=(times.st_atime_ns, times.st_mtime_ns))
    assert content_key(prefix) != before
