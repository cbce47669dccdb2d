"""What the frozen reference takes over from the student, and what not."""

from argparse import Namespace
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_ext import reference
from megatron_ext.reference import FrozenReference

OFF = {
    "perform_initialization": False,
    "recompute_granularity": None,
    "gradient_accumulation_fusion": False,
    "cuda_graph_impl": "none",
    "fine_grained_activation_offloading": False,
}


class Builder:
    """Megatron's, of a chunk that remembers its config."""

    def __init__(self, config):
        self.config = config

    def build_distributed_models(self, **_):
        chunk = torch.nn.Linear(2, 2)
        chunk.config = self.config
        return [chunk]


@dataclass
class ModelConfig:
    transformer: Any
    pre_wrap_hooks: list = field(default_factory=list)
    post_wrap_hooks: list = field(default_factory=list)

    def get_builder_cls(self):
        return Builder


@pytest.fixture
def student():
    asked = {
        "perform_initialization": True,
        "recompute_granularity": "full",
        "gradient_accumulation_fusion": True,
        "cuda_graph_impl": "local",
        "fine_grained_activation_offloading": True,
    }
    return ModelConfig(SimpleNamespace(**asked, hidden_size=7), post_wrap_hooks=[print])


def test_nothing_of_the_reference_is_recorded_offloaded_or_trained(monkeypatch, student):
    groups = SimpleNamespace(use_mpu_process_groups=lambda: None)
    monkeypatch.setattr(reference, "ProcessGroupCollection", groups)
    before = dict(vars(student.transformer))
    (chunk,) = FrozenReference._build(student)
    assert vars(chunk.config.transformer) == OFF | {"hidden_size": 7}
    assert not chunk.config.post_wrap_hooks  # or it would build a reference of its own
    assert not chunk.training
    assert not any(parameter.requires_grad for parameter in chunk.parameters())
    assert vars(student.transformer) == before


def test_it_is_read_in_parts_as_the_student_is(monkeypatch):
    group = SimpleNamespace(size=lambda: 2)
    monkeypatch.setattr(
        reference.parallel_state, "get_data_parallel_group", lambda with_context_parallel: group
    )
    args = Namespace(
        ckpt_fully_parallel_load=True, ckpt_fully_parallel_load_exchange_algo="gather_object"
    )
    strategy = reference._load_strategy(args)
    assert strategy.parallelization_group is group
    assert strategy.exchange_algo == "gather_object"
    args.ckpt_fully_parallel_load = False
    assert reference._load_strategy(args) is None
