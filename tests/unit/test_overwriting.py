"""A run says so whose folder holds another run's checkpoint, or that starts from an unfinished one."""

import logging
from argparse import Namespace
from pathlib import Path

import pytest

from megatron_ext.checkpoint.inspect import Checkpoint
from megatron_ext.checkpoint.source import Start, warn_of_overwriting, warn_of_unfinished


@pytest.mark.parametrize(
    ("load", "iteration", "resumed", "told"),
    [
        ("own", 3, True, False),  # an earlier checkpoint of the run
        ("other", 3, True, True),
        ("other", 9, True, False),
        ("other", 9, False, True),  # --finetune, and --pretrained-checkpoint without --load
        (None, None, False, True),
    ],
)
def test_a_run_that_would_write_over_another_says_so(
    tmp_path, caplog, load, iteration, resumed, told
):
    own = tmp_path / "own"
    own.mkdir()
    (own / "latest_checkpointed_iteration.txt").write_text("6")
    load = load and str(tmp_path / load)
    checkpoint = load and Checkpoint(Path(load), iteration, Path(load) / "folder", Namespace())
    args = Namespace(save=str(own), load=load, skip_train=False, rank=0)
    with caplog.at_level(logging.WARNING):
        warn_of_overwriting(args, Start(checkpoint, "--load", resumed))
        assert (f"--save {own}: holds the checkpoint of iteration 6" in caplog.text) == told
        caplog.clear()
        args.skip_train = True
        warn_of_overwriting(args, Start(checkpoint, "--load", resumed))
        warn_of_overwriting(Namespace(save=None), Start(checkpoint, "--load", resumed))
    assert not caplog.text


@pytest.mark.parametrize(
    ("iteration", "recorded", "resumed", "told"),
    [
        (600, {"train_iters": 1908}, False, True),
        (1908, {"train_iters": 1908}, False, False),
        (2000, {"train_iters": 1908}, False, False),  # a longer run, shortened
        (600, {"train_iters": 1908}, True, False),  # the run itself, which goes on
        (0, {"train_iters": 1908}, False, False),  # a release, as imports write it
        (600, {"train_iters": None}, False, False),
        (600, {}, False, False),
    ],
)
def test_a_start_from_the_middle_of_a_run_says_so(
    tmp_path, caplog, iteration, recorded, resumed, told
):
    found = Checkpoint(tmp_path, iteration, tmp_path / "folder", Namespace(**recorded))
    start = Start(found, "--pretrained-checkpoint", resumed)
    args = Namespace(rank=0, ckpt_step=None)
    caplog.set_level(logging.WARNING)
    warn_of_unfinished(args, start)
    assert (
        f"--pretrained-checkpoint {tmp_path}: its latest checkpoint is of iteration 600 of the 1908"
        in caplog.text
    ) == told
    assert bool(caplog.text) == told
    caplog.clear()
    args.ckpt_step = iteration  # it was asked for
    warn_of_unfinished(args, start)
    warn_of_unfinished(Namespace(rank=1, ckpt_step=None), start)
    assert not caplog.text
