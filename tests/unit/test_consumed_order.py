"""A run is told when the samples that it goes on with come in another order than those before."""

import logging

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
