"""A checkpoint that would run code when it is unpickled is refused before it does."""

import contextlib
import gc
import io
import os
import pickle
import warnings
from argparse import Namespace
from unittest import mock

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import filesystem, metadata
from torch.distributed.checkpoint.metadata import TensorProperties

from megatron_ext.checkpoint import safe_load, torch_dist
from megatron_ext.checkpoint.inspect import TRACKER, open_checkpoint
from megatron_ext.exceptions import CheckpointError, ConfigError


class Bomb:
    """Creates a folder when it is unpickled."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


def in_metadata(folder, bomb):
    torch_dist.write(folder, [], dtype=torch.float32, args=Namespace())
    (folder / ".metadata").write_bytes(pickle.dumps(bomb))


def in_object(folder, bomb):
    torch_dist.write(folder, [], dtype=torch.float32, args=bomb)


def in_common(folder, bomb):
    torch_dist.write(folder, [], dtype=torch.float32, args=Namespace())
    torch.save({"args": bomb}, folder / "common.pt")


PLACES = {"metadata": in_metadata, "object": in_object, "common.pt": in_common}


@pytest.fixture
def stock(monkeypatch):
    """torch as it is."""
    for name in ("TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(filesystem, "pickle", pickle)


@pytest.fixture(params=PLACES)
def bombed(request, tmp_path):
    folder, mark = tmp_path / "c" / "iter_0000003", tmp_path / "mark"
    PLACES[request.param](folder, Bomb(mark))
    (tmp_path / "c" / TRACKER).write_text("3")
    return request.param, tmp_path / "c", mark


@pytest.mark.usefixtures("stock")
def test_what_would_run_code_is_refused_before_it_does(bombed):
    _, directory, mark = bombed
    with pytest.raises(
        CheckpointError, match=r"--load: .*iter_0000003.* refused to load posix.mkdir"
    ) as e:
        open_checkpoint(directory, flag="--load")
    assert "\n" not in str(e.value)
    assert not mark.exists()


@pytest.mark.usefixtures("stock")
@pytest.mark.parametrize("bombed", ["metadata", "object"], indirect=True)
def test_torch_alone_runs_it(bombed):
    from megatron.core import dist_checkpointing

    _, directory, mark = bombed
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # What it makes of the metadata is none; the code has run by then.
        with contextlib.suppress(dcp.CheckpointException):
            dist_checkpointing.load_common_state_dict(directory / "iter_0000003")
    assert mark.exists()


@pytest.mark.usefixtures("stock")
def test_an_ordinary_checkpoint_is_read(tmp_path):
    layer = torch_dist.LazyTensor("w", (), (2, 3), lambda: torch.ones(2, 3))
    torch_dist.write(
        tmp_path / "iter_0000003", [layer], dtype=torch.bfloat16, args=Namespace(hidden_size=3)
    )
    (tmp_path / TRACKER).write_text("3")
    checkpoint = open_checkpoint(tmp_path, flag="--load")
    assert checkpoint.args.hidden_size == 3
    assert torch.equal(torch_dist.Reader(checkpoint.path).read("w"), torch.ones(2, 3).bfloat16())


@pytest.mark.usefixtures("stock")
def test_a_setting_that_allows_code_is_refused(monkeypatch):
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    with pytest.raises(ConfigError, match="TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD: expected it unset"):
        safe_load.enable()
    assert "TORCH_FORCE_WEIGHTS_ONLY_LOAD" not in os.environ


def test_what_a_newer_torch_stores_besides_is_left_out():
    class Newer(TensorProperties):
        def __getstate__(self):
            return (*super().__getstate__(), (3, 1), "and more")

    name = "PropertiesOfIt_X"  # as long as the true one
    Newer.__module__, Newer.__qualname__ = TensorProperties.__module__, name
    with mock.patch.object(metadata, name, Newer, create=True):
        content = pickle.dumps(Newer(torch.bfloat16), protocol=4)
    content = content.replace(name.encode(), b"TensorProperties")
    found = safe_load.load_metadata(io.BytesIO(content))
    assert type(found) is TensorProperties
    assert found.dtype == torch.bfloat16


def test_metadata_that_are_read_again_are_a_copy_of_their_own(tmp_path, monkeypatch):
    monkeypatch.setattr(safe_load, "_known", {})
    for name in "abc":
        layer = torch_dist.LazyTensor(name, (), (2, 3), lambda: torch.ones(2, 3))
        torch_dist.write(tmp_path / name, [layer], dtype=torch.float32, args=Namespace())
    content = {name: (tmp_path / name / ".metadata").read_bytes() for name in "abc"}
    first = safe_load.load_metadata(io.BytesIO(content["a"]))
    assert first.state_dict_metadata.pop("a").size == (2, 3)
    with mock.patch.object(safe_load, "_MetadataUnpickler", None):  # not looked through again
        again = safe_load.load_metadata(io.BytesIO(content["a"]))
    assert again.state_dict_metadata["a"].size == (2, 3)
    for name in "bc":
        assert name in safe_load.load_metadata(io.BytesIO(content[name])).state_dict_metadata
    # The latest two are kept, and one byte more is another file.
    assert len(safe_load._known) == 2
    with pytest.raises(pickle.UnpicklingError, match=r"refused to load posix\.mkdir"):
        safe_load.load_metadata(io.BytesIO(pickle.dumps(Bomb(tmp_path / "mark"))))
    assert not (tmp_path / "mark").exists()


def test_metadata_that_another_process_has_found_harmless_are_not_read_slowly_again(monkeypatch):
    content = pickle.dumps(metadata.Metadata({}, storage_data={"a": 1}))
    monkeypatch.setattr(safe_load, "_known", {})
    expected = safe_load.load_metadata(io.BytesIO(content))
    told = safe_load.known()
    safe_load._known.clear()
    safe_load.adopt(told)
    monkeypatch.setattr(safe_load, "_MetadataUnpickler", None)
    assert safe_load.load_metadata(io.BytesIO(content)) == expected
    with pytest.raises(pickle.UnpicklingError):  # of others nothing is known
        safe_load.load_metadata(io.BytesIO(content + b" "))


@pytest.mark.parametrize("before", [True, False])
def test_no_garbage_is_looked_for_while_metadata_are_read(monkeypatch, before):
    seen = []
    load = safe_load._MetadataUnpickler.load

    def load_seen(self):
        seen.append(gc.isenabled())
        return load(self)

    monkeypatch.setattr(safe_load._MetadataUnpickler, "load", load_seen)
    was_on = gc.isenabled()
    (gc.enable if before else gc.disable)()
    try:
        safe_load.load_metadata(io.BytesIO(pickle.dumps({"this test": before})))
        assert gc.isenabled() == before
        with pytest.raises(pickle.UnpicklingError):
            safe_load.load_metadata(io.BytesIO(b"no pickle"))
        assert gc.isenabled() == before
    finally:
        (gc.enable if was_on else gc.disable)()
    assert seen == [False, False]
