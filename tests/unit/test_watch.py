"""Limits of what is watched, and what a resumed run makes of them; a run's end is in tests/integration."""

import math
from argparse import Namespace
from pathlib import Path

import pytest
import torch

from megatron_ext.checkpoint.inspect import Checkpoint
from megatron_ext.checkpoint.source import Start
from megatron_ext.config import UnlearnConfig
from megatron_ext.exceptions import ConfigError
from megatron_ext.objective import Objective
from megatron_ext.watch import Watch, limits, reached_before

FLAGS = ("max_mitigation_kl", "min_forget_probability", "max_replay_increase")


def config(**fields):
    return UnlearnConfig(forget_data_path=["a"], **fields)


def start(found, *, resumed=True):
    checkpoint = Checkpoint(Path("d"), 7, Path("d/iter_0000007"), Namespace(unlearn_watch=found))
    return Start(checkpoint, "--load", resumed)


@pytest.mark.parametrize("name", FLAGS)
@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf])
def test_limits_that_no_run_can_reach_or_pass(name, value):
    flag = "--" + name.replace("_", "-")
    with pytest.raises(ConfigError, match=f"{flag}: expected a finite number .*, found {value}"):
        config(**{name: value})


def test_a_probability_is_below_one():
    with pytest.raises(ConfigError, match="between 0 and 1, found 1"):
        config(min_forget_probability=1.0)
    assert config(max_mitigation_kl=3.0).max_mitigation_kl == 3


@pytest.mark.parametrize(
    ("name", "short_of", "at", "beyond"),
    [
        ("max_mitigation_kl", 0.4, 0.5, 0.6),
        ("min_forget_probability", 0.6, 0.5, 0.4),
        ("max_replay_increase", 0.4, 0.5, 0.6),
    ],
)
def test_a_limit_is_reached_from_its_side(name, short_of, at, beyond):
    (limit,) = limits(config(**{name: 0.5}))
    assert [limit.is_reached(x) for x in (short_of, at, beyond)] == [False, True, True]
    assert limit.share(short_of) < limit.share(at) == 1 < limit.share(beyond)
    assert not limit.is_reached(math.nan)


def test_a_resumed_run_that_has_arrived_has_nothing_left():
    watched = {"mitigation kl": 0.3}
    reason = reached_before(config(max_mitigation_kl=0.25), start(watched))
    assert reason.startswith("nothing left to train: mitigation kl had reached 0.3 at iteration 7")
    assert "--max-mitigation-kl is 0.25" in reason
    assert reached_before(config(max_mitigation_kl=0.35), start(watched)) is None
    assert reached_before(config(), start(watched)) is None
    assert reached_before(config(max_replay_increase=0.1), start(watched)) is None
    assert reached_before(config(max_mitigation_kl=0.25), start(watched, resumed=False)) is None
    assert reached_before(config(max_mitigation_kl=0.25), start(None)) is None
    assert reached_before(config(max_mitigation_kl=0.25), Start(None, "--load", False)) is None


def test_a_watch_needs_its_reference_even_without_mitigation():
    for name in ("max_mitigation_kl", "max_replay_increase"):
        assert config(mitigation_weight=0, **{name: 0.1}).needs_reference
    assert not config(mitigation_weight=0, min_forget_probability=0.1).needs_reference


def test_replay_increase_is_the_difference_on_the_same_tokens():
    """Against softplus in fp64; tokens of the other role, or of none, take no part."""
    settings = config(max_replay_increase=1.0)
    objective = Objective(settings)
    generator = torch.Generator().manual_seed(1)
    terms = torch.randn(3, 9, generator=generator)
    mask = torch.tensor([1.0, 1, 1, 0, 1, 0, 0, 1, 1])
    sums = objective.sums(terms.requires_grad_(), mask)
    (gradient,) = torch.autograd.grad(sums[4], terms, retain_graph=True)
    assert not gradient.any()
    metrics = objective.metrics(sums.detach(), torch.tensor([0.0, 6.0]).double())
    chosen = mask.bool()
    expected = torch.nn.functional.softplus(-terms.detach().double())[:, chosen].mean(dim=1)
    assert metrics["replay increase"].item() == pytest.approx(
        (expected[0] - expected[2]).item(), abs=1e-6
    )
    assert metrics["reference replay loss"].item() == pytest.approx(expected[2].item(), rel=1e-6)
    # A forget microbatch has no reference.
    assert objective.sums(terms[:2].detach(), -mask)[4] == 0


def test_a_step_without_forgotten_tokens_reaches_nothing():
    settings = config(min_forget_probability=0.5, max_mitigation_kl=0.5)
    watch = Watch(Namespace(), settings)
    metrics = {"forget token probability": torch.tensor(0.0), "mitigation kl": torch.tensor(0.7)}
    watch.observe(metrics, torch.tensor([0.0, 5.0]).double())
    found = watch._observed.tolist()
    assert [limit.is_reached(value) for limit, value in zip(watch.limits, found, strict=True)] == [
        True,
        False,
    ]
