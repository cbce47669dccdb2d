"""The fused head on real ranks: sharded against whole, sequence parallelism, collectives."""

import pytest
import torch
import torch.distributed as dist

from megatron_ext.losses import head_memory
from megatron_ext.losses.head import unlearning_head
from tests.helpers.distributed import run_ranks
from tests.unit.test_head import H, T, V, actual, assert_same, expected, inputs, upstream
from tests.unit.test_head_loss import found as losses

COUNTED = (
    "all_reduce",
    "all_gather_into_tensor",
    "reduce_scatter_tensor",
    "all_gather",
    "broadcast",
)


def shard(arguments, rank, size, *, tokens=False):
    """This rank's vocabulary shard and, with sequence parallelism, its tokens."""
    mine = dict(arguments)
    columns = slice(rank * V // size, (rank + 1) * V // size)
    for name in ("weight", "reference_weight"):
        mine[name] = arguments[name].detach()[columns].clone()
    if tokens:
        for name in ("hidden", "reference_hidden"):
            mine[name] = arguments[name].detach().chunk(size)[rank].clone()
    mine["hidden"] = mine["hidden"].detach().clone().requires_grad_()
    mine["weight"].requires_grad_()
    return mine, columns


def even(arguments):
    """28 of the 29 tokens, so that two ranks can share them."""
    return {
        name: value.detach()[:28]
        if name in ("hidden", "labels", "roles", "reference_hidden")
        else value
        for name, value in arguments.items()
    }


def count_collectives():
    """Wraps the collectives of torch.distributed; returns the list of calls."""
    calls = []
    for name in COUNTED:
        original = getattr(dist, name)

        def counted(*args, _name=name, _original=original, **options):
            calls.append(_name)
            return _original(*args, **options)

        setattr(dist, name, counted)
    return calls


def check_tensor_parallel():
    rank, size = dist.get_rank(), dist.get_world_size()
    group = dist.group.WORLD
    calls = count_collectives()
    head_memory.COLUMNS_TILE = 13
    for roles in ("mixed", "forget", "replay"):
        # Blocks may differ between ranks: each has its own memory.
        blocks = [{}, {"chunk_size": 7}, {"chunk_size": 3 + rank}]
        blocks += [{"memory_budget_bytes": 2 * T * 8 * columns} for columns in (13, 13 + 10 * rank)]
        for options in blocks:
            mine, columns = shard(inputs(roles=roles), rank, size)
            want = expected(inputs(roles=roles))
            calls.clear()
            found = actual(mine, tp_group=group, **options)
            assert calls == ["all_gather_into_tensor", "all_reduce"]
            assert_same(found, (*want[:3], want[3][columns]), 1e-6)


def check_without_padding():
    """As in plain training: every column counts, and a label may lie in any shard."""
    arguments = inputs() | {"vocab_size": None}
    arguments["labels"] = torch.arange(T) + V - T  # all in the last shard
    want = actual(arguments)
    mine, columns = shard(arguments, dist.get_rank(), dist.get_world_size())
    found = actual(mine, tp_group=dist.group.WORLD)
    assert_same(found, (*want[:3], want[3][columns]), 1e-6)


def check_sequence_parallel():
    rank, size = dist.get_rank(), dist.get_world_size()
    calls = count_collectives()
    whole = even(inputs())
    a, b = (x[:28] for x in upstream())

    def run(arguments, **options):
        out = unlearning_head(**arguments, **options)
        leaves = (arguments["hidden"], arguments["weight"])
        gradients = torch.autograd.grad((a * out.margin + b * out.kl).sum(), leaves)
        return out.margin.detach(), out.kl.detach(), *gradients

    want = run(shard(whole, 0, 1)[0])
    for chunk_size in (None, 5):
        mine, columns = shard(whole, rank, size, tokens=True)
        calls.clear()
        found = run(mine, tp_group=dist.group.WORLD, sequence_parallel=True, chunk_size=chunk_size)
        # Hidden states of student and reference, statistics; d hidden.
        assert calls == ["all_gather_into_tensor"] * 3 + ["reduce_scatter_tensor"]
        tokens = want[2].chunk(size)[rank]
        assert found[2].shape == (28 // size, H)
        assert_same(found, (*want[:2], tokens, want[3][columns]), 1e-6)


def check_gradients_of_forward():
    """The head that is given the loss: a collective a chunk, those of `d hidden` in forward too."""
    rank, size = dist.get_rank(), dist.get_world_size()
    calls = count_collectives()
    chunks = {7: 5, 12: 3}
    for roles in ("mixed", "forget", "replay"):
        for chunk_size, count in chunks.items():
            mine, columns = shard(inputs(roles=roles), rank, size)
            want = expected(inputs(roles=roles))
            calls.clear()
            found = losses(mine, tp_group=dist.group.WORLD, chunk_size=chunk_size)
            assert calls == ["all_gather_into_tensor"] * count + ["all_reduce"]
            assert_same(found, (*want[:3], want[3][columns]), 1e-6)
    whole = even(inputs())
    want = losses(shard(whole, 0, 1)[0], chunk_size=9)
    mine, columns = shard(whole, rank, size, tokens=True)
    calls.clear()
    options = {"tp_group": dist.group.WORLD, "sequence_parallel": True, "chunk_size": 9}
    found = losses(mine, **options)
    assert calls == ["all_gather_into_tensor"] * (2 + 4) + ["reduce_scatter_tensor"]
    assert_same(found, (*want[:2], want[2].chunk(size)[rank], want[3][columns]), 1e-6)


def check_wrong_group_is_noticed():
    """Without its group a shard is taken for the whole: the check must see the difference."""
    mine, columns = shard(inputs(), dist.get_rank(), dist.get_world_size())
    mine["vocab_size"] = None
    mine["labels"] = mine["labels"] % (V // 2)
    want = expected(inputs() | {"labels": mine["labels"]})
    with pytest.raises(AssertionError):
        assert_same(actual(mine), (*want[:3], want[3][columns]), 1e-2)


def check_all():
    check_tensor_parallel()
    check_without_padding()
    check_sequence_parallel()
    check_gradients_of_forward()
    check_wrong_group_is_noticed()


def test_two_ranks():
    run_ranks(check_all, 2)
