"""The guard against NaN without a run; with one, in tests/integration."""

import math
from argparse import Namespace

import pytest
import torch
from megatron.core import rerun_state_machine

from megatron_ext.exceptions import TrainingError
from megatron_ext.finite import MOST_SKIPPED, FiniteGuard


@pytest.fixture
def guard(monkeypatch):
    """In step 3, after two microbatches."""
    monkeypatch.setattr(torch.distributed, "get_rank", lambda *_: 5)
    machine = rerun_state_machine.RerunStateMachine()  # its own default is the disabled mode
    monkeypatch.setattr(rerun_state_machine, "_GLOBAL_RERUN_STATE_MACHINE", machine)
    args = {"check_for_nan_in_loss_and_grad": True, "fp16": True, "min_loss_scale": 1.0}
    guard = FiniteGuard(Namespace(curr_iteration=2, **args))
    guard._sources[None] = [["sample 1 of a"], ["sample 2 of a"]]
    return guard


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_no_number(guard, value):
    with pytest.raises(
        TrainingError, match=r"step 3, rank 5: the loss of microbatch 1 is .*: sample 2 of a"
    ):
        guard.check_loss(torch.tensor(value), 1)
    guard.check_loss(torch.tensor(1e30), 1)


def test_a_sum_over_ranks_that_overflows(guard):
    with pytest.raises(
        TrainingError, match=r"norm .* over all ranks is inf, .*sample 1 .*sample 2"
    ):
        guard._check_norm(math.inf)
    guard._check_norm(3.0)
    guard._check_norm(None)


class Optimizer:
    """As much of one as the guard asks for."""

    def __init__(self, scale):
        self.scale = torch.tensor(scale)

    def get_loss_scale(self):
        return self.scale


def test_steps_that_are_skipped_for_ever(guard):
    least, larger = Optimizer(1.0), Optimizer(2.0)
    for skipped, optimizer in ((True, least), (False, least), (True, least), (True, larger)):
        for _ in range(MOST_SKIPPED - 1):
            guard._check_skipped(skipped, optimizer=optimizer)
    for _ in range(3 * MOST_SKIPPED):
        guard._check_skipped(True, optimizer=larger)
    for _ in range(MOST_SKIPPED - 1):
        guard._check_skipped(True, optimizer=least)
    with pytest.raises(
        TrainingError, match=r"step 3, rank 5: the gradients of 10 steps in a row .* sample 2 of a"
    ):
        guard._check_skipped(True, optimizer=least)


def test_a_precision_without_a_scale_skips_nothing(guard):
    guard.args.fp16 = False
    for _ in range(2 * MOST_SKIPPED):
        guard._check_skipped(True, optimizer=None)


def test_megatrons_flag_turns_it_off(guard):
    guard.args.check_for_nan_in_loss_and_grad = False
    guard.check_loss(torch.tensor(math.nan), 0)
    guard._check_norm(math.nan)


def test_the_microbatches_whose_gradient_was_bad(guard):
    found = "found NaN in local grad norm for bucket #0 in backward"
    message = f"Rank 0: Unexpected result nan (message='{found}')"
    guard._bad[None] = {0: torch.tensor(False), 1: torch.tensor(True)}
    report = guard._gradient_report(message)
    assert f"{found}; it comes from microbatch 1" in report
    assert report.endswith("its samples: sample 2 of a")
    guard._bad.clear()
    assert "no single one of the 2 microbatches" in guard._gradient_report(message)
