"""Learning rates and weight decay of a resumed run are those of the flags or those of the checkpoint."""

import types

import pytest
import torch
from megatron.core import optimizer_param_scheduler
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_ext.runtime import schedule


def group(high, low, **more):
    return {"max_lr": high, "min_lr": low, "wd_mult": 1.0, **more}


def test_groups_take_the_rates_of_their_kind():
    groups = [group(1, 0.1), group(1, 0.1, wd_mult=0.0), group(3, 0.3, is_decoupled_lr=True)]
    source = [group(5, 0.5, is_decoupled_lr=True), group(2, 0.2, wd_mult=0.0), group(2, 0.2)]
    schedule.take_rates(groups, source)
    assert groups == [source[2], source[1], source[0]]


def test_a_kind_with_several_rates_or_none_is_left_alone():
    groups = [group(1, 0.1), group(4, 0.4, wd_mult=0.0)]
    schedule.take_rates(groups, [group(2, 0.2), group(3, 0.3)])
    assert groups == [group(1, 0.1), group(4, 0.4, wd_mult=0.0)]


@pytest.mark.parametrize(
    ("flag", "high"),
    [("override_opt_param_scheduler", [1, 1]), ("use_checkpoint_opt_param_scheduler", [2, 2])]
    + [(None, [1, 2])],
)
def test_the_flag_says_whose_rates_both_have(monkeypatch, flag, high):
    """The optimizer's groups and those of the checkpoint, or Megatron would not find one by the other."""
    names = ("override_opt_param_scheduler", "use_checkpoint_opt_param_scheduler")
    args = types.SimpleNamespace(**{name: name == flag for name in names})
    monkeypatch.setattr("megatron.training.get_args", lambda: args)
    loaded = []
    load = schedule._with_rates(lambda self, state: loaded.append(state))
    own, saved = [group(1, 0.1)], [group(2, 0.2)]
    optimizer = types.SimpleNamespace(param_groups=own)
    state = {"optimizer": {"param_groups": saved}}
    load(types.SimpleNamespace(optimizer=optimizer), state)
    assert [groups[0]["max_lr"] for groups in (own, saved)] == high
    assert loaded == [state]


def test_the_first_step_has_the_checkpoints_weight_decay(monkeypatch):
    def scheduler(decay):
        weight = torch.zeros(1, requires_grad=True)
        optimizer = torch.optim.AdamW([group(1.0, 0.0, params=[weight])])
        return OptimizerParamScheduler(
            *(optimizer, 0.0, 1.0, 0.0, 0, 10, "linear", decay, decay, 10, "constant"),
            use_checkpoint_opt_param_scheduler=True,
            override_opt_param_scheduler=False,
        )

    for kind in ("FP32Optimizer", "Float16OptimizerWithFloat16Params"):
        name = f"megatron.core.optimizer.optimizer.{kind}.load_state_dict"
        monkeypatch.setattr(name, lambda self, state: None)
    name = "megatron.core.optimizer.distrib_optimizer.DistributedOptimizer.load_state_dict"
    monkeypatch.setattr(name, lambda self, state: None)
    kind = optimizer_param_scheduler.OptimizerParamScheduler
    monkeypatch.setattr(kind, "load_state_dict", kind.load_state_dict)
    before = scheduler(0.1)
    before.step(increment=4)
    stock, mended = scheduler(0.5), scheduler(0.5)
    stock.load_state_dict(before.state_dict())
    assert stock.optimizer.param_groups[0]["weight_decay"] == 0.5
    schedule.enable()
    mended.load_state_dict(before.state_dict())
    found = types.SimpleNamespace(**mended.optimizer.param_groups[0])
    assert (found.weight_decay, found.lr, mended.num_steps) == (0.1, 0.6, 4)
