"""fp32 weights of the precision-aware optimizer: whole, unless a checkpoint holds their last bits alone."""

from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from megatron_ext.checkpoint.whole_weights import keep_whole
from megatron_ext.exceptions import ConfigError


def _run(**changes):
    fields = {
        "bf16": True,
        "use_precision_aware_optimizer": True,
        "main_params_dtype": torch.float32,
        "optimizer_cpu_offload": False,
        "dist_ckpt_optim_fully_reshardable": False,
        "no_load_optim": False,
    }
    return Namespace(**fields | changes)


def _before(saved):
    return SimpleNamespace(path=Path("ckpt/iter_0000010"), args=saved)


@pytest.mark.parametrize(
    "saved",
    [
        None,
        _run(use_precision_aware_optimizer=False),
        Namespace(bf16=True),  # of a Megatron without this optimizer
        _run(bf16=False),
        _run(main_params_dtype=torch.float16),
        _run(optimizer_cpu_offload=True),
        _run(store_param_remainders=False),
        _run(store_param_remainders=False, dist_ckpt_optim_fully_reshardable=True),
    ],
)
def test_weights_are_whole(saved):
    for args in (_run(), _run(dist_ckpt_optim_fully_reshardable=True)):
        keep_whole(args, None if saved is None else _before(saved))
        assert args.store_param_remainders is False


def test_a_run_goes_on_from_the_bits_as_it_began():
    for saved in (_run(), _run(store_param_remainders=True)):
        args = _run()
        keep_whole(args, _before(saved))
        assert args.store_param_remainders is True


@pytest.mark.parametrize(
    ("saved", "now", "message"),
    [
        (
            {"dist_ckpt_optim_fully_reshardable": True},
            {},
            "--load: expected a checkpoint with fp32 weights, found none",
        ),
        (
            {},
            {"use_precision_aware_optimizer": False},
            "--use-precision-aware-optimizer: expected it, for the optimizer of ckpt/iter_0000010 kept only",
        ),
        (
            {},
            {"dist_ckpt_optim_fully_reshardable": True},
            "--dist-ckpt-optim-fully-reshardable: expected a run without it",
        ),
    ],
)
def test_what_the_bits_are_of_no_use_for_is_refused(saved, now, message):
    with pytest.raises(ConfigError, match=message):
        keep_whole(_run(**now), _before(_run(**saved)))
    keep_whole(anew := _run(**now, no_load_optim=True), _before(_run(**saved)))
    assert anew.store_param_remainders is False
