"""The limit of open files, against what data sets hold open until a run ends."""

import gc
import os
import resource
from argparse import Namespace

import pytest
from megatron.core.datasets.utils import Split

from megatron_ext.config import UnlearnConfig
from megatron_ext.data import checks, open_files, providers
from megatron_ext.data.index_cache import DatasetBuilder
from megatron_ext.data.open_files import files_of, make_room
from megatron_ext.data.sourced import SourcedGPTDataset
from megatron_ext.exceptions import ConfigError
from tests.helpers.gpt_datasets import dataset_config, documents
from tests.helpers.text import write_dataset

FOLDER = "/proc/self/fd"


@pytest.mark.skipif(not os.path.isdir(FOLDER), reason="this system does not list open files")
@pytest.mark.parametrize(("split", "splits"), [("90,10,0", 2), ("1", 1)])
@pytest.mark.parametrize("mmap", [True, False])
def test_the_files_of_data_sets_are_those_that_megatron_leaves_open(tmp_path, split, splits, mmap):
    prefixes = [write_dataset(tmp_path / f"s{i}", documents(i)) for i in range(3)]
    config = dataset_config(
        prefixes, [1.0, 2.0, 3.0], tmp_path / "cache", split=split, mmap_bin_files=mmap
    )
    gc.collect()
    before = len(os.listdir(FOLDER))
    built = DatasetBuilder(SourcedGPTDataset, [30, 3, 0], lambda: True, config).build()
    held = len(os.listdir(FOLDER)) - before
    assert sum(part is not None for part in built) == splits
    blends = 2 * splits  # of each split of the blend two arrays, whatever the number of data sets
    assert held == files_of(3, splits=splits, mmap=mmap) + blends


@pytest.fixture
def low_limit():
    """A soft limit of 512, and the hard one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (512, hard))
    yield hard
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def soft_limit():
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]


def test_the_soft_limit_is_raised_as_far_as_need_be(low_limit):
    hard = float("inf") if low_limit == resource.RLIM_INFINITY else low_limit
    make_room(1000)
    raised = soft_limit()
    assert raised == min(hard, 1000 + 4096)
    make_room(10)  # and not taken back
    assert soft_limit() == raised


def test_a_rank_raises_its_limit_before_it_opens_data(low_limit, monkeypatch):
    found = []

    def build(*_):
        found.append(soft_limit())
        return None, None, None

    monkeypatch.setattr(providers, "_build", build)
    names = [f"s{i}" for i in range(300)]
    blends = (None, [(names, None), (["valid"], None), None])
    monkeypatch.setattr(providers, "get_blend_and_blend_per_split", lambda _: blends)
    args = Namespace(mock_data=False, mmap_bin_files=True, dataloader_inter_document_masking=False)
    providers.build_datasets(args, UnlearnConfig(), [1, 1, 1])
    assert found[0] >= min(low_limit, files_of(301, splits=1, mmap=True)) > 512


def test_more_files_than_may_be_open_are_refused(monkeypatch):
    monkeypatch.setattr(open_files, "_limits", lambda: (1024, 4096))
    shares = {Split.train: (0, 0.9), Split.valid: (0.9, 1), Split.test: None}
    args = Namespace(mmap_bin_files=True, dataloader_inter_document_masking=False)

    def check(*counts):
        blends = [
            checks._NamedBlend("--data-path", (["x"] * count, None), shares) for count in counts
        ]
        nothing = checks._NamedBlend("--test-data-path", None, {Split.test: None})
        checks._check_open_files(args, [*blends, nothing])

    check(400, 26)
    message = (
        r"^ulimit -n: expected a hard limit of at least 4099 open files, 3843 of them for 427 data "
        r"sets, found 4096"
    )
    with pytest.raises(ConfigError, match=message):
        check(400, 27)
    # For attention within documents each chunk of an interleaved pipeline opens them.
    args.dataloader_inter_document_masking = True
    args.virtual_pipeline_model_parallel_size = None
    check(400, 26)
    args.virtual_pipeline_model_parallel_size = 2
    with pytest.raises(ConfigError, match=r"at least 4108 open files, 3852 of them for 214 data s"):
        check(213, 1)
    check(212, 1)
