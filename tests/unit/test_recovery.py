"""A run whose latest checkpoint is broken goes on from the last complete one, and says so."""

import argparse
import logging
import pickle

import pytest

from megatron_ext.checkpoint import complete
from megatron_ext.checkpoint.complete import MARKS, defect
from megatron_ext.checkpoint.inspect import TRACKER, open_checkpoint
from megatron_ext.checkpoint.recovery import folder, last_good
from megatron_ext.checkpoint.source import resolve_start
from megatron_ext.exceptions import CheckpointError, ConfigError
from tests.helpers.checkpoints import write_iterations


@pytest.fixture
def directory(tmp_path):
    """Checkpoints of iterations 2, 4 and 6."""
    return write_iterations(tmp_path, 2, 4, 6)


def arguments(directory, **changes):
    flags = {
        "dist_ckpt_strictness": "log_all",
        "ckpt_step": None,
        "finetune": False,
        "load": str(directory),
        "rank": 0,
    }
    flags |= {"pretrained_checkpoint": None, "unpadded_vocab_size": 500, "seq_length": 64}
    flags |= {"save": None, "skip_train": False, "ckpt_convert_format": None}
    return argparse.Namespace(**flags | changes)


def files(directory):
    return sorted(folder(directory, 6).iterdir())


def truncate(path, size):
    with path.open("r+b") as stream:
        stream.truncate(size)


def test_a_complete_checkpoint_has_no_defect(directory):
    assert len(files(directory)) == 3
    assert defect(folder(directory, 6)) is None
    assert last_good(directory, flag="--load") is None
    args = arguments(directory)
    start = resolve_start(args, required=True)
    assert (start.checkpoint.iteration, start.resumed, args.ckpt_step) == (6, True, None)


@pytest.mark.parametrize("file", [0, 1, 2])
@pytest.mark.parametrize("change", ["delete", "empty", "half", "last byte"])
def test_each_missing_or_short_file_is_recognised(directory, file, change, caplog):
    path = files(directory)[file]
    size = path.stat().st_size
    if change == "delete":
        path.unlink()
    else:
        truncate(path, {"empty": 0, "half": size // 2, "last byte": size - 1}[change])
    assert path.name in defect(folder(directory, 6))
    args = arguments(directory)
    with caplog.at_level(logging.WARNING):
        start = resolve_start(args, required=True)
    assert (start.checkpoint.iteration, start.resumed, args.ckpt_step) == (4, True, 4)
    (line,) = [r.getMessage() for r in caplog.records if "going on from" in r.getMessage()]
    assert "iter_0000006 is broken" in line
    assert line.endswith("iter_0000004")
    # What defines another objective or another start is never replaced by an older one.
    with pytest.raises(CheckpointError, match=r"--reference-load: .*iter_0000006"):
        open_checkpoint(directory, flag="--reference-load")
    with pytest.raises(CheckpointError, match=r"--load: .*iter_0000006"):
        resolve_start(arguments(directory, finetune=True), required=True)
    with pytest.raises(CheckpointError, match=r"--load: .*iter_0000006"):
        resolve_start(arguments(directory, ckpt_step=6), required=True)


@pytest.mark.parametrize("text", [None, "", "6\0", "six"])
def test_a_lost_tracker_is_written_again_by_rank_0(directory, text):
    tracker = directory / TRACKER
    tracker.unlink()
    if text is not None:
        tracker.write_text(text)
    # Another checkpoint to start from must not win silently.
    named = {"pretrained_checkpoint": str(directory)}
    other = resolve_start(arguments(directory, rank=1, **named), required=True)
    assert other.checkpoint.iteration == 6
    assert other.resumed
    assert tracker.is_file() == (text is not None)
    first = resolve_start(arguments(directory, **named), required=True)
    assert first == other
    assert tracker.read_text() == "6"


def test_an_unfinished_newer_folder_is_left_alone(directory):
    folder(directory, 8).mkdir()
    assert last_good(directory, flag="--load") is None


def test_saves_of_which_none_ended_start_from_the_beginning(directory):
    (directory / TRACKER).unlink()
    for iteration, marks in ((2, MARKS[:1]), (4, MARKS), (6, MARKS)):
        for mark in marks:
            (folder(directory, iteration) / mark).unlink()
    choice = last_good(directory, flag="--load")
    assert choice.iteration is None
    assert "no checkpoint was finished (iter_0000002: metadata.json is missing" in choice.reason


def test_only_the_first_save_may_start_from_the_beginning(directory):
    (directory / TRACKER).unlink()
    for iteration in (2, 4, 6):
        files_of = folder(directory, iteration)
        (files_of / MARKS[0]).unlink()
    with pytest.raises(CheckpointError, match=r"found none \(iter_0000006: .*iter_0000002: "):
        last_good(directory, flag="--load")
    for iteration in (4, 6):
        folder(directory, iteration).rename(directory / f"gone{iteration}")
    choice = last_good(directory, flag="--load")
    assert choice.iteration is None
    assert "starting from the beginning" in choice.reason
    (directory / TRACKER).write_text("2")  # it was finished once
    with pytest.raises(CheckpointError, match=r"iter_0000002 is broken .*found none"):
        resolve_start(arguments(directory), required=True)


def test_a_release_has_no_older_one(directory):
    (directory / TRACKER).write_text("release")
    assert last_good(directory, flag="--load") is None


def test_a_step_that_each_restart_would_go_back_to_is_refused(directory):
    (directory / "link").symlink_to(directory)
    back = {"ckpt_step": 4, "save": str(directory / "link")}
    with pytest.raises(
        ConfigError, match=r"--ckpt-step: .* 6, found 4; .* write 4 into .*iteration\.txt"
    ):
        resolve_start(arguments(directory, **back), required=True)
    # Nothing comes after these, or is written over by them.
    harmless = ({"ckpt_step": 6}, {"save": str(directory / "other")}, {"skip_train": True})
    for change in (*harmless, {"ckpt_convert_format": "torch_dist"}):
        expected = change.get("ckpt_step", 4)
        start = resolve_start(arguments(directory, **back | change), required=True)
        assert start.checkpoint.iteration == expected
    # The way that the message names; a broken one on it is stepped over as ever.
    (directory / TRACKER).write_text("4")
    args = arguments(directory, save=str(directory))
    assert resolve_start(args, required=True).checkpoint.iteration == 4
    (folder(directory, 4) / MARKS[0]).unlink()
    assert resolve_start(args, required=True).checkpoint.iteration == 2


def test_a_checkpoint_is_looked_at_once_for_a_start_and_again_after_it(directory, monkeypatch):
    looked_at = []
    look = complete._look_for_defect
    monkeypatch.setattr(
        complete, "_look_for_defect", lambda path: looked_at.append(path) or look(path)
    )
    (directory / "link").symlink_to(directory)
    tensors = files(directory)[1]
    with complete.looked_at_once():
        resolve_start(arguments(directory), required=True)
        open_checkpoint(directory / "link", flag="--reference-load")
        assert looked_at == [folder(directory, 6)]
    truncate(tensors, 1)
    assert tensors.name in defect(folder(directory, 6))
    with complete.looked_at_once():
        assert resolve_start(arguments(directory), required=True).checkpoint.iteration == 4
    assert looked_at[1:] == [folder(directory, 6)] * 2 + [folder(directory, 4)]


def test_a_file_behind_a_link_or_in_a_folder_of_its_own_counts(directory):
    path = folder(directory, 6)
    (tensors,) = path.glob("*.distcp")
    elsewhere = tensors.rename(directory / "elsewhere")
    tensors.symlink_to(elsewhere)
    assert defect(path) is None
    truncate(elsewhere, 1)
    assert f"{tensors.name} has 1 of " in defect(path)
    elsewhere.unlink()
    assert defect(path) == f"{tensors.name} is missing"
    with (path / ".metadata").open("rb") as stream:
        metadata = pickle.load(stream)
    for item in metadata.storage_data.values():
        item.relative_path = f"part/{tensors.name}"
    (path / ".metadata").write_bytes(pickle.dumps(metadata))
    assert defect(path) == f"part/{tensors.name} is missing"
    (path / "part").mkdir()
    (path / "part" / tensors.name).write_bytes(bytes(10**6))
    assert defect(path) is None
