"""A run whose folder holds another run's checkpoint says so."""

import logging
from argparse import Namespace
from pathlib import Path

import pytest

from megatron_ext.checkpoint.inspect import Checkpoint
from megatron_ext.checkpoint.source import Start, warn_of_overwriting


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
