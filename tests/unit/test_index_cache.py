"""A cached index is whole or is built again, whoever was killed and whoever shares the folder."""

import errno
import faulthandler
import os
import signal

import numpy as np
import pytest
import torch
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset

from megatron_ext.data.index_cache import DatasetBuilder
from megatron_ext.data.sourced import SourcedGPTDataset
from megatron_ext.exceptions import DataError
from tests.helpers.gpt_datasets import dataset, dataset_config, documents, files
from tests.helpers.text import write_dataset

ARRAYS = ("document_index", "sample_index", "shuffle_index")
BLEND_ARRAYS = ("dataset_index", "dataset_sample_index")


@pytest.fixture
def prefix(tmp_path):
    return write_dataset(tmp_path / "d", documents(1))


@pytest.fixture
def prefixes(tmp_path):
    return [write_dataset(tmp_path / f"d{i}", documents(i)) for i in range(2)]


def blend(of, prefixes, cache, *, builder=DatasetBuilder, **more):
    """The training split of a blend."""
    config = dataset_config(prefixes, [0.3, 0.7], cache, **more)
    return builder(of, [100, 0, 0], lambda: True, config).build()[0]


def arrays(made):
    """Copies of the indices of a dataset and of those that it blends."""
    names = BLEND_ARRAYS if hasattr(made, "datasets") else ARRAYS
    own = [np.array(getattr(made, name)) for name in names]
    return own + [array for part in getattr(made, "datasets", ()) for array in arrays(part)]


def same(first, second):
    return len(first) == len(second) and all(map(np.array_equal, first, second))


def cut(path, share):
    with path.open("r+b") as stream:
        stream.truncate(int(path.stat().st_size * share) - (share == 1))


def forked(work):
    """How a child process ends that does some work."""
    child = os.fork()
    if child == 0:
        faulthandler.disable()  # how it dies is no news
        work()
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_the_indices_are_those_of_megatron(prefixes, tmp_path):
    stock = blend(GPTDataset, prefixes, tmp_path / "stock", builder=BlendedMegatronDatasetBuilder)
    ours = blend(SourcedGPTDataset, prefixes, tmp_path / "ours")
    assert same(arrays(ours), arrays(stock))
    assert len(files(tmp_path / "ours")) == 3 + 2 * 4
    assert same(arrays(blend(SourcedGPTDataset, prefixes, None)), arrays(stock))


def test_rank_0_maps_what_it_built_and_lets_go_of_the_rest(prefix, tmp_path):
    made = dataset(SourcedGPTDataset, prefix, tmp_path / "cache")
    assert all(isinstance(getattr(made, name), np.memmap) for name in ARRAYS)
    assert len(made.indices) == 0


@pytest.mark.parametrize("share", [0, 0.5, 1])
@pytest.mark.parametrize("name", ARRAYS)
def test_a_cut_array_is_built_again_with_a_line(prefix, tmp_path, name, share, caplog):
    cache = tmp_path / "cache"
    expected = arrays(dataset(SourcedGPTDataset, prefix, cache))
    (file,) = cache.glob(f"*{name}.npy")
    cut(file, share)
    assert same(arrays(dataset(SourcedGPTDataset, prefix, cache)), expected)
    (message,) = [record.getMessage() for record in caplog.records]
    assert str(cache) in message
    assert "building the index again" in message
    before = files(cache)
    dataset(SourcedGPTDataset, prefix, cache)
    assert files(cache) == before


@pytest.mark.parametrize("name", BLEND_ARRAYS)
def test_so_is_one_of_a_blend(prefixes, tmp_path, name, caplog):
    cache = tmp_path / "cache"
    expected = arrays(blend(SourcedGPTDataset, prefixes, cache))
    (file,) = cache.glob(f"*-{name}.npy")
    cut(file, 0.5)
    assert same(arrays(blend(SourcedGPTDataset, prefixes, cache)), expected)
    assert len(caplog.records) == 1


@pytest.mark.parametrize(("share", "error"), [(0, EOFError), (0.5, ValueError), (1, ValueError)])
def test_megatron_alone_never_starts_again(prefix, tmp_path, share, error):
    dataset(GPTDataset, prefix, tmp_path / "cache")
    (file,) = (tmp_path / "cache").glob("*shuffle_index.npy")
    cut(file, share)
    for _ in range(2):
        with pytest.raises(error):
            dataset(GPTDataset, prefix, tmp_path / "cache")


@pytest.mark.parametrize("survived", [0, 1, 2])
def test_a_killed_build_leaves_nothing_that_looks_like_an_index(
    prefix, tmp_path, survived, monkeypatch
):
    cache, save, saved = tmp_path / "cache", np.save, []

    def save_or_die(path, array, **options):
        if len(saved) == survived:
            with open(path, "wb") as stream:
                stream.write(b"\x93NUMPY")
            os.kill(os.getpid(), signal.SIGKILL)
        saved.append(path)
        save(path, array, **options)

    with monkeypatch.context() as patch:
        patch.setattr(np, "save", save_or_die)
        ended = forked(lambda: dataset(SourcedGPTDataset, prefix, cache))
    assert ended == -signal.SIGKILL
    assert all(path.name.startswith(".partial-") for path in cache.iterdir())
    expected = arrays(dataset(SourcedGPTDataset, prefix, tmp_path / "other"))
    assert same(arrays(dataset(SourcedGPTDataset, prefix, cache)), expected)


def race(of, prefix, cache, monkeypatch):
    """A job begins to build, another builds and maps the same; it reads while the first one writes."""
    save, second = np.save, []

    def save_later(path, array, **options):
        if not second:
            second.append(None)  # the other job's own writes go straight through
            second[0] = dataset(of, prefix, cache)
        if second[0] is None:
            return save(path, array, **options)
        with open(path, "wb"):
            arrays(second[0])
        return save(path, array, **options)

    monkeypatch.setattr(np, "save", save_later)
    first = dataset(of, prefix, cache)
    return arrays(first), arrays(second[0])


def test_jobs_that_build_the_same_index_at_once_both_have_it(prefix, tmp_path, monkeypatch):
    expected = arrays(dataset(SourcedGPTDataset, prefix, tmp_path / "other"))
    first, second = race(SourcedGPTDataset, prefix, tmp_path / "cache", monkeypatch)
    assert same(first, expected)
    assert same(second, expected)
    assert len(files(tmp_path / "cache")) == 4
    assert not list((tmp_path / "cache").glob(".partial-*"))


def test_the_files_of_the_first_job_stay(prefix, tmp_path, monkeypatch):
    """Over NFS a file that is replaced is gone for those that have mapped it on another machine."""
    publish, seen = os.replace, []
    monkeypatch.setattr(os, "replace", lambda *names: (seen.append(names), publish(*names)))
    race(SourcedGPTDataset, prefix, tmp_path / "cache", monkeypatch)
    assert len(seen) == len(ARRAYS) + 1  # those of the job that was first, and its description


def test_megatron_alone_kills_the_job_that_has_mapped_it(prefix, tmp_path, monkeypatch):
    def work():
        # The other job's arrays are mapped once they come from the cache.
        dataset(GPTDataset, prefix, tmp_path / "cache")
        mapped = dataset(GPTDataset, prefix, tmp_path / "cache")
        (file,) = (tmp_path / "cache").glob("*shuffle_index.npy")
        with file.open("wb"):  # as numpy.save begins
            arrays(mapped)

    assert forked(work) == -signal.SIGBUS


def test_what_others_are_writing_stays_and_what_was_abandoned_goes(prefix, tmp_path):
    cache = tmp_path / "cache"
    cache.mkdir()
    for name, hours in (("busy", 2), ("old", 48)):
        file = cache / f".partial-{name}"
        file.touch()
        os.utime(file, (file.stat().st_mtime - 3600 * hours,) * 2)
    dataset(SourcedGPTDataset, prefix, cache)
    assert [path.name for path in cache.glob(".partial-*")] == [".partial-busy"]


def test_a_full_disk_is_named_and_leaves_nothing(prefix, tmp_path, monkeypatch):
    def full(path, array, **options):
        raise OSError(errno.ENOSPC, "No space left on device", path)

    monkeypatch.setattr(np, "save", full)
    with pytest.raises(DataError, match=r"cache: .* cannot be written, with .* MiB free"):
        dataset(SourcedGPTDataset, prefix, tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


@pytest.mark.parametrize("flag", ["fast_cache_load", "defer_npy_index_mmap"])
def test_an_index_that_must_be_there_is_asked_for(prefix, tmp_path, flag):
    cache, parts = tmp_path / "cache", [([prefix], None), None, None]
    # Megatron takes these flags beside data sets that are named for each split only.
    options = {"split": None, "blend": None, "blend_per_split": parts}
    with pytest.raises(DataError, match=r"tools/build_index\.py"):
        dataset(SourcedGPTDataset, prefix, cache, **options, **{flag: True})
    expected = dataset(SourcedGPTDataset, prefix, cache, **options)
    made = dataset(SourcedGPTDataset, prefix, cache, **options, **{flag: True})
    assert len(made) == len(expected)
    assert torch.equal(made[3]["tokens"], expected[3]["tokens"])


def test_another_rank_asks_for_a_shared_folder(prefix, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 1)
    with pytest.raises(DataError, match="on a disk that all nodes share, found none"):
        dataset(SourcedGPTDataset, prefix, tmp_path / "cache")
