"""A microbatch that would be trained the wrong way round is refused where it is read."""

from argparse import Namespace

import pytest
import torch
from megatron.core import parallel_state

from megatron_ext import training
from megatron_ext.config import UnlearnConfig
from megatron_ext.data import batch
from megatron_ext.exceptions import DataError
from megatron_ext.training import UnlearnStep


@pytest.fixture
def alone(monkeypatch):
    """A rank that shares nothing, with what stands for the groups of one that does."""
    for name in ("get_tensor_model_parallel_rank", "get_tensor_model_parallel_src_rank"):
        monkeypatch.setattr(parallel_state, name, lambda: 0)
    for name in ("get_tensor_model_parallel_group", "get_context_parallel_group"):
        monkeypatch.setattr(parallel_state, name, lambda: None)
    for name in ("is_pipeline_first_stage", "is_pipeline_last_stage"):
        monkeypatch.setattr(parallel_state, name, lambda **_: True)
    monkeypatch.setattr(batch, "is_first_or_last_pipeline_stage", lambda stage: True)
    for name in ("get_batch_on_this_tp_rank", "get_batch_on_this_cp_rank"):
        monkeypatch.setattr(batch, name, lambda given, **_: given)
    monkeypatch.setattr(torch.Tensor, "cuda", lambda self, **_: self)


def read(mask, forget):
    args = Namespace(
        create_attention_mask_in_dataloader=False,
        dataloader_inter_document_masking=False,
        **{"context_parallel_size": 1, "pipeline_model_parallel_size": 1, "seq_length": 3},
    )
    sample = {"loss_mask": torch.tensor([mask])}
    options = {"args": args, "vp_stage": None, "micro_batch_size": 1}
    return batch.read_micro_batch(iter([sample]), **options, forget=forget)


@pytest.mark.parametrize(
    ("mask", "forget", "role"),
    [
        ([-1.0, 0.0, 1.0], True, "forgotten samples, found 1 tokens"),
        ([1.0, 1.0, 0.0], True, "forgotten samples, found 2 tokens"),
        ([-1.0, 0.0, 1.0], False, "replayed samples, found 1 tokens"),
    ],
)
def test_tokens_of_the_other_role_are_refused(alone, mask, forget, role):
    with pytest.raises(DataError, match=f"expected a microbatch of {role} of the other role"):
        read(mask, forget)


@pytest.mark.parametrize(
    ("mask", "forget"),
    [([-1.0, 0.0, -1.0], True), ([1.0, 0.0, 1.0], False), ([0.0] * 3, True), ([0.0] * 3, False)]
    + [([-1.0, 0.0, 1.0], None)],  # plain training asks for none
)
def test_tokens_of_the_right_role_or_of_none_are_taken(alone, mask, forget):
    found = read(mask, forget)
    assert found.loss_mask.tolist() == [mask]
    assert found.forget is forget


def test_the_first_microbatches_of_a_step_are_to_be_forgotten(monkeypatch):
    asked = []
    monkeypatch.setattr(training, "get_attr_wrapped_model", lambda chunk, name: chunk)
    monkeypatch.setattr(
        training,
        "read_micro_batch",
        lambda iterator, *, vp_stage, forget, **_: asked.append((iterator, vp_stage, forget)),
    )
    args = Namespace(data_parallel_size=2, global_batch_size=16, log_straggler=False)
    step = object.__new__(UnlearnStep)
    step.args = args
    step.config = UnlearnConfig(forget_data_path=["qa"], forget_batch_size=12)
    count = step._forget_microbatches(4, 2)
    step._read(["a", "b"], [0, 1], 4, count, 2)
    roles = [True, True, True, False]
    assert asked == [(name, chunk, r) for name, chunk in (("a", 0), ("b", 1)) for r in roles]
    # A validation batch of half the size has the same proportion.
    assert step._forget_microbatches(4, 1) * 2 == 12 // 2
