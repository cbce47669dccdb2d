"""A run that would write over another run's checkpoints is refused."""

import re
from argparse import Namespace
from pathlib import Path

import pytest

from megatron_ext.checkpoint.inspect import Checkpoint
from megatron_ext.checkpoint.source import Start, refuse_overwriting
from megatron_ext.exceptions import ConfigError


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
    refuse_overwriting(Namespace(**vars(args) | {"save": None}), start)
