"""A run whose latest checkpoint is broken goes on from the last complete one, and says so."""

import argparse
import logging

import pytest

from megatron_ext.checkpoint import inspect
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
    flags = {"ckpt_step": None, "finetune": False, "load": str(directory), "rank": 0}
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


def test_under_torchrun_one_rank_of_a_node_looks_at_what_all_are_told_to_load(
    directory, monkeypatch
):
    monkeypatch.setattr(inspect, "defect", lambda path: "a file is missing")
    named = {"load": None, "pretrained_checkpoint": str(directory)}
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "job")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert resolve_start(arguments(directory, **named), required=True).checkpoint.iteration == 6
    monkeypatch.setenv("LOCAL_RANK", "0")
    with pytest.raises(CheckpointError, match=r"--pretrained-checkpoint: .*iter_0000006"):
        resolve_start(arguments(directory, **named), required=True)
    monkeypatch.undo()
    # Which of the run's own checkpoints is the last good one, all ranks must know.
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "job")
    monkeypatch.setenv("LOCAL_RANK", "1")
    truncate(files(directory)[1], 1)
    assert resolve_start(arguments(directory), required=True).checkpoint.iteration == 4


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
