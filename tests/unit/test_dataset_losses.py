"""Sums by dataset, before ranks add them up."""

import math
from argparse import Namespace
from unittest import mock

import megatron.training.training as loop
import pytest
import torch
from megatron.core import parallel_state

from megatron_ext import dataset_losses
from megatron_ext.config import UnlearnConfig
from megatron_ext.data.batch import MicroBatch
from megatron_ext.dataset_losses import DatasetLosses, by_sample
from megatron_ext.objective import MEANS, Objective

BLEND = (["a/web", "b/web", "c/code"], [0.5, 0.4, 0.1])


@pytest.fixture
def losses(monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_device", lambda: "cpu")
    blends = {"get_blend_and_blend_per_split": lambda _: (BLEND, None)}
    objective = Objective(UnlearnConfig(forget_data_path=["c/qa"], max_replay_increase=1.0))
    with mock.patch.multiple(dataset_losses, **blends):
        forget = (None, [(["c/qa", "b/web"], None), (["c/qa"], None), None])
        return DatasetLosses(Namespace(), objective, forget)


def batch(datasets, mask, *, forget):
    return MicroBatch(datasets=datasets, loss_mask=mask, forget=forget)


def written(losses, total):
    """What goes to TensorBoard; W&B must get the same."""
    found, wandb = {}, mock.Mock()
    writer = mock.Mock(add_scalar=lambda tag, value, _: found.update({tag: value}))
    writers = {"get_tensorboard_writer": lambda: writer, "get_wandb_writer": lambda: wandb}
    with mock.patch.multiple(dataset_losses, **writers):
        losses._write(total.tolist(), 7, "")
    wandb.log.assert_called_once_with(found, 7)
    return found


def test_means_are_those_of_each_dataset_and_role(losses):
    torch.manual_seed(0)
    samples = []  # dataset, forget, sums, tokens
    for step in range(150):  # more than wait at a time
        forget = step % 3 == 0
        datasets = ["c/qa", "b/web"] if forget else ["b/web", "a/web"]
        mask = torch.randint(0, 2, (2, 5)).float() * (-1 if forget else 1)
        terms = torch.randn(3, 5, 2)
        losses.add(batch(datasets, mask, forget=forget), terms.flatten(1), training=True)
        for i, dataset in enumerate(datasets):
            sums = losses.terms.sums(terms[:, :, i], mask[i])
            samples.append((dataset, forget, sums, float(mask[i].abs().sum())))
    found = written(losses, losses._of(True).fold())

    def mean(dataset, forget, index):
        chosen = [
            (sums[index], n) for name, role, sums, n in samples if (name, role) == (dataset, forget)
        ]
        return float(sum(s for s, _ in chosen) / sum(n for _, n in chosen))

    expected = {}
    for dataset in ("a/web", "b/web"):
        for index in (1, 2, 4):
            expected[f"{MEANS[index]}/{dataset}"] = mean(dataset, False, index)
        expected[f"replay increase/{dataset}"] = mean(dataset, False, 1) - mean(dataset, False, 4)
    # What is both forgotten and replayed has both.
    for dataset in ("c/qa", "b/web"):
        for index in (0, 3):
            expected[f"{MEANS[index]}/{dataset}"] = mean(dataset, True, index)
    assert found == pytest.approx(expected, rel=1e-6)  # nothing of c/code, which has no sample


def test_validation_is_kept_apart_and_other_ranks_add_nothing(losses):
    mask = torch.ones(1, 4)
    terms = torch.zeros(3, 4)  # margin 0: a cross-entropy of log 2
    # Plain training asks for no role.
    losses.add(batch(["c/code"], mask, forget=None), terms, training=False)
    losses.add(MicroBatch(loss_mask=mask, forget=False), terms, training=True)
    assert losses._of(True).fold().abs().sum() == 0
    (row,) = [row for row in losses._of(False).fold().tolist() if any(row)]
    assert row == pytest.approx([0, 4 * math.log(2), 0, 0, 4 * math.log(2), 4], rel=1e-6)


def test_a_log_is_of_all_ranks_since_the_log_before(losses, monkeypatch):
    groups = {
        "is_pipeline_last_stage": lambda ignore_virtual: ignore_virtual,
        "get_data_parallel_group": lambda with_context_parallel: f"data {with_context_parallel}",
        "get_tensor_model_parallel_group": lambda: "tensor",
        "get_tensor_model_parallel_src_rank": lambda: 6,
    }
    for name, function in groups.items():
        monkeypatch.setattr(parallel_state, name, function)
    shared, written = [], []
    ranks = {
        "all_reduce": lambda total, group: (shared.append(group), total.mul_(2)),
        "broadcast": lambda total, src, group: shared.append((src, group)),
        **{"get_rank": lambda: 7, "get_world_size": lambda: 8},
    }
    for name, function in ranks.items():
        monkeypatch.setattr(torch.distributed, name, function)
    monkeypatch.setattr(
        losses, "_write", lambda totals, *_: written.append(sum(t[-1] for t in totals))
    )
    for tokens in (4, 3):
        losses.add(
            batch(["c/code"], torch.ones(1, tokens), forget=False),
            torch.zeros(3, tokens),
            training=True,
        )
        losses.log(tokens, training=True)
    assert written == [8, 6]  # with those of another rank
    assert shared == ["data True", (6, "tensor")] * 2


def test_steps_are_logged_at_the_interval_and_each_validation_by_its_name(losses, monkeypatch):
    logged = []
    for name in ("checkpoint_and_decide_exit", "evaluate_and_print_results"):
        monkeypatch.setattr(loop, name, lambda *_, **__: "result")
    monkeypatch.setattr(losses, "log", lambda iteration, **how: logged.append((iteration, how)))
    losses.args.dataset_log_interval = 5
    losses.install()
    for iteration in (5, 6, 10):
        assert loop.checkpoint_and_decide_exit(None, None, None, iteration) == "result"
    for prefix in ("iteration 10", "iteration 10 on test set"):
        assert loop.evaluate_and_print_results(prefix, None, None, None, 10) == "result"
    validations = [{"training": False, "kind": kind} for kind in (" validation", " test")]
    steps = [(iteration, {"training": True}) for iteration in (5, 10)]
    assert logged == [*steps, *((10, how) for how in validations)]


def test_terms_by_sample_follow_the_order_of_the_head():
    mask = torch.zeros(3, 5)  # b, s
    terms = torch.arange(30).view(2, 15)  # n, s * b, sequence-major
    found = by_sample(terms, mask)
    assert found.shape == (2, 3, 5)
    for token in range(5):
        for sample in range(3):
            assert found[1, sample, token] == 15 + token * 3 + sample
