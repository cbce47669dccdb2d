"""The frozen reference leaves no trace but its digest, and nothing can change it."""

from argparse import Namespace
from pathlib import Path

import pytest
import torch.distributed.checkpoint as dcp

from megatron_ext.checkpoint.inspect import Checkpoint, open_checkpoint
from megatron_ext.checkpoint.source import Start, check_kept, find_reference
from megatron_ext.config import UnlearnConfig
from megatron_ext.exceptions import CheckpointError, ConfigError
from tests.helpers.entry import ROOT, Launch
from tests.helpers.tiny import ITERATIONS
from tests.integration.conftest import STEPS


def tensors(path):
    """Shapes by name, of what is stored sharded."""
    metadata = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
    return {name: getattr(entry, "size", None) for name, entry in metadata.items()}


def size(path):
    return sum(file.stat().st_size for file in path.iterdir())


def test_a_checkpoint_holds_no_more_than_that_of_a_plain_run(tiny, straight, runs_directory):
    plain = tiny.base / f"iter_{ITERATIONS:07d}"
    unlearned = runs_directory / "straight" / f"iter_{STEPS:07d}"
    assert tensors(unlearned) == tensors(plain)
    # Apart from tensors there are the arguments, among them which reference it was.
    assert abs(size(unlearned) / size(plain) - 1) < 0.02


def test_default_reference_is_the_start_and_no_mitigation_means_none(
    tiny, server, straight, runs_directory
):
    start = ("--load", tiny.base, "--finetune", "--train-iters", 2)
    launches = {
        "default": Launch(tiny.objective(*start)),
        "none": Launch(tiny.objective(*start, "--mitigation-weight", 0)),
        "read in parts": Launch(tiny.objective(*start, "--ckpt-fully-parallel-load"), ranks=2),
    }
    runs = server.run_all(launches, runs_directory / "reference")
    assert str(tiny.base) in runs["default"].line("reference:")
    assert runs["default"].digest() != straight.digest()
    assert runs["read in parts"].digest() == runs["default"].digest()
    # Student and reference are the same at first, so their KL is 0 but for rounding.
    assert runs["default"].scalars["mitigation kl"][1] < 1e-6
    assert "reference:" not in runs["none"].output
    assert not [tag for tag in runs["none"].scalars if "mitigation" in tag]
    # The other terms do not depend on the reference before the first step, but for the last bit: beside a
    # reference the sums over the vocabulary are of other kernels, and some processors show it.
    for tag in ("forget loss", "replay loss"):
        expected = pytest.approx(runs["default"].scalars[tag][1], rel=3e-7)
        assert runs["none"].scalars[tag][1] == expected


def test_a_reference_that_changes_is_found_out(tiny, server, runs_directory):
    launch = Launch(
        tiny.unlearn("--train-iters", 1),
        script=ROOT / "tests" / "helpers" / "changed_reference.py",
    )
    result = server.run(launch, runs_directory / "changed_reference")
    assert result.returncode == 2
    assert "reference: expected digest" in result.output
    assert "its weights were changed during the run" in result.output


def test_a_recorded_reference_that_was_moved_is_asked_for(tmp_path):
    gone = tmp_path / "gone"
    record = {"directory": str(gone), "folder": "iter_0000003", "digest": "0"}
    saved = Namespace(unlearn_reference=record)
    resumed = Start(Checkpoint(Path("runs/a"), 3, Path("runs/a/iter"), saved), "--load", True)
    args, config = Namespace(load="runs/a"), UnlearnConfig(forget_data_path=["a"])
    with pytest.raises(CheckpointError, match=f"--reference-load: .* runs/a .* nothing at {gone}"):
        find_reference(args, config, resumed)


def test_a_checkpoint_that_a_resume_does_not_read_is_named(tiny, caplog):
    record = {"directory": str(tiny.base), "folder": "iter_0000040", "digest": "0"}
    base = open_checkpoint(tiny.base, flag="--load")
    base.args.unlearn_reference = record
    resumed = Start(base, "--load", True)
    own = vars(base.args) | {"load": "runs/a", "save": None, "rank": 0}
    config = UnlearnConfig(forget_data_path=["a"])
    for named, told in ((None, 0), (str(tiny.base), 0), (str(tiny.reference), 1)):
        caplog.clear()
        args = Namespace(**(own | {"pretrained_checkpoint": named}))
        assert find_reference(args, config, resumed).recorded_digest == "0"
        assert caplog.text.count("--pretrained-checkpoint") == told


@pytest.mark.parametrize(
    ("resumed", "train_iters", "refused"),
    [(0, 300, True), (0, 299, False), (299, 300, True), (300, 400, False), (0, None, True)],
)
def test_a_run_that_would_overwrite_its_reference_is_refused(
    tmp_path, resumed, train_iters, refused
):
    save, elsewhere = tmp_path / "save", tmp_path / "elsewhere"
    (save / "iter_0000300").mkdir(parents=True)
    elsewhere.symlink_to(save)  # another name of the same directory
    reference = Checkpoint(elsewhere, 300, elsewhere / "iter_0000300", Namespace())
    start = Start(Checkpoint(save, resumed or 300, save, Namespace()), "--load", resumed > 0)
    args = Namespace(
        save=str(save), skip_train=False, train_iters=train_iters, save_retain_interval=None
    )
    if refused:
        with pytest.raises(ConfigError, match=f"--save: .* {save}, .* iteration 300 of this run"):
            check_kept(args, start, reference)
    else:
        check_kept(args, start, reference)
    for harmless in ({"save": str(tmp_path / "new")}, {"save": None}, {"skip_train": True}):
        check_kept(Namespace(**(vars(args) | harmless)), start, reference)


def test_a_run_whose_first_save_would_delete_its_reference_is_refused(tmp_path):
    (tmp_path / "iter_0000300").mkdir()
    tracker = tmp_path / "latest_checkpointed_iteration.txt"
    tracker.write_text("300")
    reference = Checkpoint(tmp_path, 300, tmp_path / "iter_0000300", Namespace())
    start = Start(reference, "--load", False)
    args = Namespace(save=str(tmp_path), skip_train=False, train_iters=100, save_retain_interval=40)
    with pytest.raises(ConfigError, match=r"--save: .* --save-retain-interval 40 .*iter_0000300"):
        check_kept(args, start, reference)
    for harmless in ({"save": str(tmp_path / "new")}, {"save_retain_interval": 100}):
        check_kept(Namespace(**(vars(args) | harmless)), start, reference)
    tracker.write_text("40")  # of this run, which has begun
    check_kept(args, start, reference)
