"""What is said of noise that a reference computes without."""

from argparse import Namespace

import pytest

from megatron_ext.config import UnlearnConfig
from megatron_ext.noise import warn_of_noise


@pytest.mark.parametrize(
    ("rates", "jitter", "weight", "found"),
    [
        ((0.1, 0.1), None, 1.0, "--hidden-dropout 0.1, --attention-dropout 0.1: the reference"),
        ((0.0, 0.1), None, 1.0, "--attention-dropout 0.1: the reference"),
        ((0.0, 0.0), None, 1.0, None),
        ((0.1, 0.1), 0.01, 0, None),
        ((0.0, 0.0), 0.01, 1.0, "--moe-input-jitter-eps 0.01: the reference computes"),
    ],
)
def test_noise_against_a_reference_is_told(rates, jitter, weight, found, caplog):
    args = Namespace(hidden_dropout=rates[0], attention_dropout=rates[1], rank=0)
    args.num_experts, args.moe_input_jitter_eps = 4, jitter
    config = UnlearnConfig(forget_data_path=["a"], mitigation_weight=weight)
    warn_of_noise(args, config)
    assert found in caplog.text if found else not caplog.text
    assert "dropout 0," not in caplog.text
    caplog.clear()
    args.num_experts = None  # and so without a router
    warn_of_noise(args, config)
    assert bool(caplog.text) == (any(rates) and weight > 0)
