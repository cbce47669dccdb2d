"""The scale of balancing losses where only some tokens are in the loss, as Megatron asks for it."""

from argparse import Namespace
from types import SimpleNamespace

import megatron.training.training as loop
import pytest
import torch
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import schedules

from megatron_ext import balancing

MASKS = ([[1, 0, 0, 0], [0, 0, 0, 0]], [[1, 1, 1, 0], [0, 0, 1, 0]])  # of two microbatches
SHARE = 5 / 16


@pytest.fixture
def rank(monkeypatch):
    """Which rank this is, and what the others have counted."""
    found = SimpleNamespace(last=True, context=0, others=(0.0, 0.0))
    monkeypatch.setattr(
        parallel_state,
        "is_pipeline_last_stage",
        lambda ignore_virtual: ignore_virtual and found.last,
    )
    monkeypatch.setattr(parallel_state, "get_context_parallel_rank", lambda: found.context)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: "cpu")
    monkeypatch.setattr(
        torch.distributed, "all_reduce", lambda counts: counts.add_(counts.new_tensor(found.others))
    )
    return found


def samples():
    return iter([{"loss_mask": torch.tensor(mask).float()} for mask in MASKS])


def scales(data_iterator, *, grad_scale=None, forward_only=False):
    """Run a step; what was read of each iterator, and what Megatron scales balancing losses by."""
    config = SimpleNamespace(grad_scale_func=grad_scale, num_moe_experts=2)
    model = [SimpleNamespace(config=config)]
    arguments = {"model": model, "num_microbatches": 2, "forward_only": forward_only}

    def schedule(*, data_iterator, seq_length, **others):
        assert seq_length == 4
        assert others == arguments
        several = isinstance(data_iterator, list)
        iterators = data_iterator if several else [data_iterator]
        read = [None if one is None else len(list(one)) for one in iterators]
        first, second = (schedules._get_moe_loss_scale(config, "cpu") for _ in range(2))
        assert first is not second  # Megatron writes into the first one later
        return (read if several else read[0]), first.item()

    return balancing.scale_balancing(
        schedule, data_iterator=data_iterator, seq_length=4, **arguments
    )


def test_they_weigh_as_much_as_they_would_if_all_tokens_were_in_the_loss(rank):
    assert scales(samples()) == (2, pytest.approx(SHARE))
    rank.others = (11.0, 16.0)  # those of another copy of the model
    assert scales(samples()) == (2, pytest.approx(0.5))


def test_the_loss_scale_of_fp16_stays_in_it(rank):
    assert scales(samples(), grad_scale=lambda one: one * 1024) == (2, pytest.approx(1024 * SHARE))


@pytest.mark.parametrize("change", [{"last": False}, {"context": 1}])
def test_a_rank_whose_tokens_others_count_has_their_share(rank, change):
    vars(rank).update(change, others=(12.0, 16.0))
    assert scales(samples()) == (2, pytest.approx(0.75))
    assert scales(None) == (None, pytest.approx(0.75))  # nor reads every rank


def test_chunks_of_a_stage_read_on_their_own(rank):
    assert scales([None, samples()]) == ([None, 2], pytest.approx(SHARE))


def test_validation_is_left_alone(rank):
    assert scales(samples(), forward_only=True) == (2, 1.0)


def test_the_loop_gets_a_schedule_that_scales(monkeypatch):
    monkeypatch.setattr(loop, "get_forward_backward_func", lambda size: f"schedule of {size}")
    monkeypatch.setattr(balancing, "scale_balancing", lambda *given, **named: (given, named))
    fetched = []
    monkeypatch.setattr(balancing.loaders, "fetch_whole_steps", lambda: fetched.append(True))
    balancing.install()
    assert fetched  # it reads a whole step first
    found = loop.get_forward_backward_func(size=2)(model="chunks")
    assert found == (("schedule of 2",), {"model": "chunks"})


@pytest.mark.parametrize(
    ("changes", "needed"),
    [
        ({}, True),
        ({"moe_aux_loss_coeff": [0.0, 0.1]}, True),
        ({"moe_aux_loss_coeff": 0.0}, False),  # no read-ahead and no exchange for nothing
        ({"moe_aux_loss_coeff": 0.0, "moe_z_loss_coeff": 1e-3}, True),
        ({"calculate_per_token_loss": False}, False),
        ({"num_experts": None}, False),
    ],
)
def test_where_the_schedule_is_gone_around(changes, needed):
    args = {"num_experts": 4, "calculate_per_token_loss": True, "moe_aux_loss_coeff": 0.01}
    args |= {"moe_z_loss_coeff": None} | changes
    assert balancing.is_needed(Namespace(**args)) is needed
