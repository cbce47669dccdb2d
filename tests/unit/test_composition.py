import pytest
import torch

from megatron_ext.data.composition import ComposedDataset
from megatron_ext.exceptions import DataError


def dataset(offset, count):
    """Samples that say where they come from; the second of three tokens is masked."""
    return [
        {"tokens": torch.tensor([offset + i]), "loss_mask": torch.tensor([1.0, 0.0, 1.0])}
        for i in range(count)
    ]


def compose(forget=10, replay=10, *, f=3, g=5):
    return ComposedDataset(
        dataset(0, forget),
        dataset(100, replay),
        forget_samples=f,
        global_batch_size=g,
        split="train",
    )


def test_the_first_samples_of_each_batch_are_forgotten():
    tokens = [int(compose()[i]["tokens"]) for i in range(15)]
    assert tokens == [0, 1, 2, 100, 101, 3, 4, 5, 102, 103, 6, 7, 8, 104, 105]


def test_the_sign_of_the_mask_is_the_role_and_zero_stays_zero():
    composed = compose()
    assert composed[0]["loss_mask"].tolist() == [-1, 0, -1]
    assert composed[3]["loss_mask"].tolist() == [1, 0, 1]


def test_samples_of_the_datasets_are_not_changed():
    composed = compose()
    for _ in range(2):
        assert composed[0]["loss_mask"].tolist() == [-1, 0, -1]
    assert composed.forget[0]["loss_mask"].tolist() == [1, 0, 1]


@pytest.mark.parametrize(("forget", "replay", "batches"), [(10, 10, 3), (3, 100, 1), (100, 5, 2)])
def test_length_is_that_of_whole_batches(forget, replay, batches):
    assert len(compose(forget, replay)) == 5 * batches


@pytest.mark.parametrize(("forget", "replay"), [(2, 10), (10, 1), (0, 0)])
def test_data_that_fill_no_batch_are_refused(forget, replay):
    with pytest.raises(
        DataError, match=f"expected at least 3 forget and 2 replay .*{forget} and {replay}"
    ):
        compose(forget, replay)
