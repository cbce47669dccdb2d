"""Groups and optimizers without parameters in Megatron's checkpoints."""

import copy
import types

import pytest
import torch
from megatron.core.dist_checkpointing.dict_utils import extract_matching_values

from megatron_ext.runtime import empty_groups
from megatron_ext.runtime.empty_groups import share_step


class GroupAdam(torch.optim.SGD):
    """Counts its steps in each group, as Transformer Engine's does."""


def _made(of, parameters):
    return of([{"params": parameters}, {"params": []}], lr=1e-2)


@pytest.fixture
def kinds(monkeypatch):
    """Megatron's optimizer of half-precision weights, whose groups and load are a stand-in's."""
    from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params as Half

    def state_of(self):
        return {"optimizer": {"state": {}}, "fp32_from_fp16_params": self.fp32_from_float16_groups}

    monkeypatch.setattr(Half, "sharded_state_dict", state_of)
    monkeypatch.setattr(Half, "load_state_dict", lambda self, state: self.loaded.append(state))
    empty_groups.enable(monkeypatch.setattr)
    return Half


def _through_a_checkpoint(state):
    """What Megatron's load takes from a checkpoint's tensors; the rest it takes from the first rank's."""
    return extract_matching_values(state, lambda value: isinstance(value, torch.Tensor))[0]


@pytest.mark.parametrize("numbers", [(2, 0, 1), (0, 1), (1, 0), (0, 0)])
def test_weights_stay_in_their_groups(kinds, numbers):
    groups = [[torch.full((2,), float(i))] * count for i, count in enumerate(numbers)]
    half = types.SimpleNamespace(fp32_from_float16_groups=groups, loaded=[])
    saved = kinds.sharded_state_dict(half)
    kinds.load_state_dict(half, {"optimizer": {}, **_through_a_checkpoint(saved)})
    assert half.loaded == [{"optimizer": {"state": {}}, "fp32_from_fp16_params": groups}]
    # As a list they move up.
    plain = _through_a_checkpoint({"weights": groups}).get("weights", [])
    assert len(plain) == sum(map(bool, numbers))


def test_a_list_of_a_checkpoint_is_left_as_it_is(kinds):
    groups = [[torch.zeros(1)], [torch.ones(1)]]
    half = types.SimpleNamespace(fp32_from_float16_groups=groups, loaded=[])
    saved = {"fp32_from_fp16_params": groups, "optimizer": {"state": {0: {}}}}
    kinds.load_state_dict(half, copy.copy(saved))
    assert half.loaded == [saved]


def test_an_adam_without_parameters_has_the_step_of_its_sibling():
    parameter = torch.ones(3, requires_grad=True)
    full, empty = _made(torch.optim.AdamW, [parameter]), _made(torch.optim.AdamW, [])
    share_step([full, empty])  # before the first step
    assert [float(s["step"]) for s in empty.state_dict()["state"].values()] == [0.0]
    for _ in range(3):
        parameter.grad = torch.ones(3)
        full.step()
        empty.step()
    share_step([full, empty])
    assert [float(s["step"]) for s in empty.state_dict()["state"].values()] == [3.0]
    assert len(full.state) == 1


def test_so_have_the_groups_of_an_optimizer_that_counts_in_them():
    full, empty = _made(GroupAdam, [torch.ones(3)]), _made(GroupAdam, [])
    share_step([full, empty])
    assert not any("step" in group for group in empty.param_groups)
    full.param_groups[0]["step"] = 4
    share_step([full, empty])
    assert [group["step"] for group in empty.param_groups] == [4, 4]
