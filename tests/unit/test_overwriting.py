"""What is told of the folders of a run: another run's checkpoints in its own, an unfinished start."""

import logging
import re
from argparse import Namespace
from pathlib import Path

import pytest

from megatron_ext.checkpoint.inspect import Checkpoint
from megatron_ext.checkpoint.source import Start, refuse_overwriting
from megatron_ext.exceptions import ConfigError
from megatron_ext.watch import warn_of_unfinished


@pytest.mark.parametrize(
    ("load", "iteration", "resumed", "refused"),
    [
        ("own", 3, True, False),  # an earlier checkpoint of the run
        ("own", 6, False, True),  # --finetune
        ("other", 3, True, True),
        ("other", 9, True, False),
        ("other", 9, False, True),  # --finetune, and --pretrained-checkpoint without --load
        (None, None, False, True),
    ],
)
def test_later_checkpoints_of_another_run_are_not_written_over(
    tmp_path, load, iteration, resumed, refused
):
    own = tmp_path / "own"
    own.mkdir()
    (own / "latest_checkpointed_iteration.txt").write_text("6")
    load = load and str(tmp_path / load)
    checkpoint = load and Checkpoint(Path(load), iteration, Path(load) / "folder", Namespace())
    args = Namespace(save=str(own), load=load, skip_train=False, overwrite_checkpoints=False)
    args.ckpt_convert_format = None
    start = Start(checkpoint, "--load", resumed)
    if refused:
        message = (
            rf"--save {re.escape(str(own))}: .* iteration \d, found that of iteration 6; .*--load"
        )
        with pytest.raises(ConfigError, match=message):
            refuse_overwriting(args, start)
    else:
        refuse_overwriting(args, start)
    refuse_overwriting(Namespace(**vars(args) | {"overwrite_checkpoints": True}), start)
    refuse_overwriting(Namespace(**vars(args) | {"skip_train": True}), start)
    refuse_overwriting(Namespace(**vars(args) | {"ckpt_convert_format": "torch"}), start)
    refuse_overwriting(Namespace(**vars(args) | {"save": None}), start)


LIMITED = {"train_iters": 1908, "max_mitigation_kl": 0.5}


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
        # A limit ended it, or has not yet.
        (600, LIMITED | {"unlearn_watch": {"mitigation kl": 0.6}}, False, False),
        (600, LIMITED | {"unlearn_watch": {"mitigation kl": 0.4}}, False, True),
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
