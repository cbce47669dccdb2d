"""A run is told when the samples that it goes on with come in another order than those before."""

import logging
from argparse import Namespace

import numpy as np
import pytest
import torch

from megatron_ext.data import consumed


def samples(*, epochs=1, seed=1, documents=40):
    """As Megatron's: all epochs are shuffled together."""
    order = np.random.RandomState(seed).permutation(np.tile(np.arange(documents), epochs))
    return [{"tokens": torch.tensor([number, 7])} for number in order.tolist()]


def part(start, dataset, weights=(0.5, 0.5)):
    orders = [consumed._order(dataset), consumed._order(samples(seed=9))]
    return {"start": start, "roles": {"learn": {"order": orders, "weights": list(weights)}}}


@pytest.mark.parametrize(
    ("before", "told"),
    [
        ([part(0, samples())], False),
        ([part(0, samples(seed=2)), part(4, samples())], False),
        ([part(0, samples()), part(8, samples(seed=2))], False),  # lost with a killed run
        (
            [{"start": 0, "roles": {"learn": {"weights": [0.5, 0.5]}}}],
            False,
        ),  # of an earlier version
        ([], False),
        ([part(0, samples(epochs=2))], True),
        ([part(0, samples(seed=2))], True),
        ([part(0, samples(documents=41))], True),
        ([part(0, samples(), weights=(0.4, 0.6))], True),
        ([part(0, samples()), part(4, samples(seed=2))], True),
    ],
)
def test_another_order_is_told_of(before, told, caplog):
    with caplog.at_level(logging.WARNING):
        consumed._compare_order(before, part(8, samples()))
    assert ("from sample 8 on, the samples to learn" in caplog.text) == told


def test_a_data_set_of_one_sample_has_an_order():
    assert consumed._order(samples()[:1]) != consumed._order(samples()[:2])


def run(**changes):
    """The arguments of a run that goes on at its fourth sample."""
    usual = {"skip_train": False, "mock_data": False, "phase_transition_iterations": None}
    usual |= {"dataloader_type": "single", "consumed_train_samples": 4, "global_batch_size": 2}
    return Namespace(**usual | {"consumed_data": [{**part(0, samples()), "batch": 2}]} | changes)


@pytest.mark.parametrize(
    "changes",
    [
        {"skip_train": True},
        {"mock_data": True},
        {"phase_transition_iterations": [3]},
        {"dataloader_type": "cyclic"},
    ],
)
def test_a_run_that_does_not_read_in_order_has_no_record(changes):
    args = run(**changes)
    consumed.record_start(args, None, forget_samples=0)
    assert args.consumed_data is None


def test_all_ranks_have_the_record_of_the_first(monkeypatch):
    """Which alone has the training set; the arguments of a checkpoint must be the same on all."""
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 0)
    sent = []
    monkeypatch.setattr(
        torch.distributed, "broadcast_object_list", lambda parts, src: sent.append((src, *parts))
    )
    first, other = run(), run()
    monkeypatch.setattr(consumed, "_describe", lambda train: {**train, "weights": [1.0]})
    consumed.record_start(first, {"order": ["a"]}, forget_samples=0)
    assert sent == [(0, first.consumed_data)]
    assert [part["start"] for part in first.consumed_data] == [0, 4]
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 1)
    monkeypatch.setattr(
        torch.distributed,
        "broadcast_object_list",
        lambda parts, src: parts.__setitem__(0, sent[0][1]),
    )
    consumed.record_start(other, None, forget_samples=0)
    assert other.consumed_data == first.consumed_data
