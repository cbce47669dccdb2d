"""Two runs that save into one directory: the second to save ends, before it writes anything."""

import types

import megatron.training.training as loop
import pytest

from megatron_ext.exceptions import CheckpointError
from megatron_ext.runtime import resume
from megatron_ext.runtime.one_writer import OneWriter


def test_own_and_earlier_checkpoints_are_no_strangers(tmp_path):
    (tmp_path / "iter_0000002").mkdir()
    writer = OneWriter()
    writer.begin(tmp_path)
    for iteration in (4, 6, 6):
        writer.claim(tmp_path, iteration)
        (tmp_path / f"iter_{iteration:07d}").mkdir(exist_ok=True)
    (tmp_path / "iter_0000002").rmdir()  # as --save-retain-interval does
    writer.claim(tmp_path, 8)


def test_a_directory_that_is_yet_to_be_made_is_empty(tmp_path):
    writer = OneWriter()
    writer.begin(tmp_path / "new")
    writer.claim(tmp_path / "new", 1)


@pytest.mark.parametrize("foreign", [4, 5])
def test_the_run_that_comes_second_ends_before_it_saves(tmp_path, monkeypatch, foreign):
    saved = []
    options = types.SimpleNamespace(save=str(tmp_path), load=None, iteration=0, rank=0)
    monkeypatch.setattr(loop, "save_checkpoint", lambda iteration, *_: saved.append(iteration))
    monkeypatch.setattr(loop, "setup_model_and_optimizer", lambda *_, **__: "model")
    monkeypatch.setattr(loop, "get_args", lambda: options)
    monkeypatch.setattr(loop, "get_tensorboard_writer", lambda: None)
    resume.prepare_saves()
    assert loop.setup_model_and_optimizer() == "model"
    (tmp_path / "iter_0000003").mkdir()
    options.rank = 1  # which writes none of the files that name a checkpoint
    loop.save_checkpoint(3)
    options.rank = 0
    (tmp_path / "iter_0000003").rmdir()
    loop.save_checkpoint(3)
    folder = tmp_path / f"iter_{foreign:07d}"
    folder.mkdir()
    mark = folder / "metadata.json"
    mark.touch()
    with pytest.raises(
        CheckpointError, match=rf"^--save .* found {folder.name}, which another run"
    ):
        loop.save_checkpoint(4)
    assert saved == [3, 3]
    assert mark.exists()


def test_a_run_that_has_ended_for_another_is_not_brought_back_by_torchrun(tmp_path, monkeypatch):
    def start(*, restarts: int, name: str = "17") -> OneWriter:
        monkeypatch.setenv("SLURM_JOB_ID", name)
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", str(restarts))
        writer = OneWriter()
        writer.begin(tmp_path)
        return writer

    writer = start(restarts=0)
    (tmp_path / "iter_0000002").mkdir()
    with pytest.raises(CheckpointError, match="which another run has saved"):
        writer.claim(tmp_path, 2)
    for restarts in (1, 2):
        with pytest.raises(CheckpointError, match="which another run has saved"):
            start(restarts=restarts)
    start(restarts=1, name="18").claim(tmp_path, 4)  # the other run goes on
    start(restarts=0).claim(tmp_path, 4)  # and so may this one, if somebody starts it anew
    start(restarts=1).claim(tmp_path, 4)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["iter_0000002"]


def test_without_a_name_of_its_own_a_run_leaves_no_note(tmp_path, monkeypatch):
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "100")  # as other runs may have it too
    writer = OneWriter()
    writer.begin(tmp_path)
    (tmp_path / "iter_0000002").mkdir()
    with pytest.raises(CheckpointError):
        writer.claim(tmp_path, 2)
    assert [path.name for path in tmp_path.iterdir()] == ["iter_0000002"]


def test_a_save_that_cannot_make_its_folder_says_so(tmp_path, monkeypatch):
    def save(*_):
        raise PermissionError("no")

    options = types.SimpleNamespace(save=str(tmp_path / "a" / "b"), load=None, iteration=0, rank=0)
    monkeypatch.setattr(loop, "save_checkpoint", save)
    monkeypatch.setattr(loop, "setup_model_and_optimizer", lambda *_, **__: "model")
    monkeypatch.setattr(loop, "get_args", lambda: options)
    monkeypatch.setattr(loop, "get_tensorboard_writer", lambda: None)
    resume.prepare_saves()
    loop.setup_model_and_optimizer()
    with pytest.raises(CheckpointError, match=r"^--save .*a/b: .* with [1-9].* MiB free .*: no$"):
        loop.save_checkpoint(1)
