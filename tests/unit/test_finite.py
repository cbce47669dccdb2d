"""The guard against NaN without a run; with one, in tests/integration."""

import math
import types
from argparse import Namespace

import megatron.training.training as loop
import pytest
import torch
from megatron.core import parallel_state, rerun_state_machine
from megatron.core.distributed.param_and_grad_buffer import _ParamAndGradBucketGroup
from torch.utils._python_dispatch import TorchDispatchMode

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
    pipeline(monkeypatch, 1)
    return guard


def pipeline(monkeypatch, stages):
    monkeypatch.setattr(parallel_state, "get_pipeline_model_parallel_world_size", lambda: stages)


class Waits(TorchDispatchMode):
    """Counts what would wait for a GPU: numbers that the host takes from tensors."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **kwargs or {})


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_loss_in_a_pipeline_goes_no_further(guard, value, monkeypatch):
    pipeline(monkeypatch, 2)
    with pytest.raises(
        TrainingError, match=r"step 3, rank 5: the loss of microbatch 1 is .*: sample 2 of a"
    ):
        guard.check_loss(torch.tensor(value), 1)
    guard.check_loss(torch.tensor(1e30), 1)


def run(guard, losses, gradients, *, large=False):
    """A step of these losses and gradients; how often it waited for a number."""
    check = _ParamAndGradBucketGroup.check_grads
    groups = [
        types.SimpleNamespace(buckets=[types.SimpleNamespace(grad_data=g)]) for g in gradients
    ]
    with Waits() as waits:

        def schedule(**_):
            guard._sources[None] = [["sample 1 of a"], ["sample 2 of a"]]
            for index, loss in enumerate(losses):
                guard.check_loss(loss, index)
            for group in groups:
                check(group, check_for_nan_or_inf=True, check_for_large=large)
            return waits.count

        return guard._run(schedule)


@pytest.fixture
def asked(monkeypatch):
    """What Megatron's own check of gradients is asked for."""
    asked = []
    check = lambda _, nan_or_inf, large: asked.append((nan_or_inf, large))  # noqa: E731
    monkeypatch.setattr(_ParamAndGradBucketGroup, "check_grads", check)
    return asked


@pytest.fixture
def installed(guard, monkeypatch, asked):
    """The guard in Megatron's loop."""
    for name in ("get_forward_backward_func", "train_step"):
        monkeypatch.setattr(loop, name, getattr(loop, name))
    guard.install()
    return guard


FINE = [torch.tensor(1e30), torch.tensor(2.0, dtype=torch.float64)]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_losses_and_gradients_are_looked_at_behind_the_step(installed, value):
    assert run(installed, FINE, [torch.ones(3), torch.zeros(2)]) == 0
    with pytest.raises(
        TrainingError, match=r"step 3, rank 5: the loss of microbatch 1 is .*: sample 2 of a$"
    ):
        run(installed, [FINE[0], torch.tensor(value)], [torch.ones(3), torch.tensor([math.nan])])
    kind = "NaN" if math.isnan(value) else "Inf"
    with pytest.raises(TrainingError, match=f"step 3, rank 5: found {kind} in local grad norm"):
        run(installed, FINE, [torch.ones(3), torch.tensor([0.0, value])])
    assert run(installed, FINE, [torch.ones(3)]) == 0  # and begins anew


def test_megatrons_own_check_of_gradients_stays_where_more_is_asked_of_it(
    installed, asked, monkeypatch
):
    run(installed, FINE, [torch.tensor([math.nan])], large=True)
    assert asked == [(True, True)]
    pipeline(monkeypatch, 2)
    assert run(installed, FINE, [torch.tensor([math.nan])] * 2) == len(FINE)
    assert asked[1:] == [(True, False)] * 2


def test_a_graph_is_not_kept_for_its_loss(installed):
    weight = torch.ones(1, requires_grad=True)
    installed.check_loss((2 * weight).sum(), 0)
    assert not installed._losses[0][1].requires_grad


def test_a_sum_over_ranks_that_overflows(guard, monkeypatch):
    met = []
    monkeypatch.setattr(torch.distributed, "barrier", lambda: met.append(True))
    with pytest.raises(
        TrainingError, match=r"norm .* over all ranks is inf, .*sample 1 .*sample 2"
    ):
        guard._check_norm(math.inf)
    assert (
        met
    )  # a rank whose own gradient is bad has ended by then, and this one waits for it in vain
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
    guard._bad[None] = {0: torch.tensor(False), 1: torch.tensor(True)}
    report = guard._gradient_report(found)
    assert f"{found}; it comes from microbatch 1" in report
    assert report.endswith("its samples: sample 2 of a")
    guard._bad.clear()
    assert "no single one of the 2 microbatches" in guard._gradient_report(found)
