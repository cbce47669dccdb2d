"""What the frozen reference takes over from the student, and what not."""

from argparse import Namespace
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor

from megatron_ext import frozen
from megatron_ext.exceptions import CheckpointError
from megatron_ext.frozen import FrozenModel
from megatron_ext.reference import FrozenReference

OFF = {
    "perform_initialization": False,
    "recompute_granularity": None,
    "gradient_accumulation_fusion": False,
    "cuda_graph_impl": "none",
    "fine_grained_activation_offloading": False,
    "fp8": None,
    "fp8_param": False,
    "fp4": None,
    "fp4_param": False,
    "quant_recipe": None,
    "tp_comm_overlap": False,  # whose buffers are fp8's
    "moe_input_jitter_eps": None,
    "moe_router_padding_for_quantization": False,
    "moe_router_padding_for_fp8": False,
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
        "fp8": "hybrid",
        "fp8_param": True,
        "fp4": "e2m1",
        "fp4_param": True,
        "quant_recipe": object(),
        "tp_comm_overlap": True,
        "moe_input_jitter_eps": 0.1,
        "moe_router_padding_for_quantization": True,
        "moe_router_padding_for_fp8": True,
    }
    return ModelConfig(SimpleNamespace(**asked, hidden_size=7), post_wrap_hooks=[print])


def test_nothing_of_the_reference_is_recorded_offloaded_or_trained(monkeypatch, student):
    groups = SimpleNamespace(use_mpu_process_groups=lambda: None)
    monkeypatch.setattr(frozen, "ProcessGroupCollection", groups)
    before = dict(vars(student.transformer))
    (chunk,) = FrozenModel.build(student)
    assert vars(chunk.config.transformer) == OFF | {"hidden_size": 7}
    assert not chunk.config.post_wrap_hooks  # or it would build a reference of its own
    assert not chunk.training
    assert not any(parameter.requires_grad for parameter in chunk.parameters())
    assert vars(student.transformer) == before


def test_without_fp8_its_communication_overlaps_as_the_students_does(monkeypatch, student):
    groups = SimpleNamespace(use_mpu_process_groups=lambda: None)
    monkeypatch.setattr(frozen, "ProcessGroupCollection", groups)
    student.transformer.fp8 = None
    (chunk,) = FrozenModel.build(student)
    assert chunk.config.transformer.tp_comm_overlap


@pytest.mark.parametrize(
    ("microbatches", "stages", "group"),
    [(4, 4, 4), (8, 2, 2), (5, 2, 3), (7, 4, 7), (9, 4, 5), (12, 4, 4), (32, 8, 8)],
)
def test_groups_of_microbatches_are_the_smallest_that_the_schedule_takes(
    microbatches, stages, group
):
    """Each group, the last one too, must fill the pipeline."""
    assert frozen.schedule_group(microbatches, stages) == group


def test_it_is_read_in_parts_as_the_student_is(monkeypatch):
    group = SimpleNamespace(size=lambda: 2)
    monkeypatch.setattr(
        frozen.parallel_state,
        "get_data_parallel_group",
        lambda with_context_parallel: group if with_context_parallel else None,
    )
    args = Namespace(
        ckpt_fully_parallel_load=True, ckpt_fully_parallel_load_exchange_algo="gather_object"
    )
    strategy = frozen._load_strategy(args)
    assert strategy.parallelization_group is group
    assert strategy.exchange_algo == "gather_object"
    args.ckpt_fully_parallel_load = False
    assert frozen._load_strategy(args) is None


def tensors(**shapes):
    """What a model or a checkpoint holds, all of it on one rank."""
    found = [
        ShardedTensor.from_rank_offsets(f"decoder.{k}", torch.zeros(s)) for k, s in shapes.items()
    ]
    return {tensor.key: tensor for tensor in found}


@pytest.mark.parametrize(
    ("present", "message"),
    [
        ({"a": (2,)}, "the tensors of this architecture, found 1 missing, decoder.b among them"),
        ({"a": (2,), "b": (3,), "c": (4,), "d": (5,)}, "found 2 more, decoder.c among them"),
        ({"a": (2,), "b": (4,)}, r"decoder.b of shape \(3,\), found \(4,\)"),
    ],
)
def test_a_tensor_that_does_not_fit_is_named_with_the_flag(monkeypatch, present, message):
    """`--model` and `--checkpoint` open models that are nobody's reference."""
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 1)
    monkeypatch.setattr(
        torch.distributed, "all_gather_object", lambda parts, own: parts.__setitem__(0, own)
    )
    monkeypatch.setattr(frozen, "load_sharded_metadata", lambda path: tensors(**present))
    monkeypatch.setattr(FrozenModel, "_shards", lambda self: list(tensors(a=(2,), b=(3,)).values()))
    monkeypatch.setattr(FrozenModel, "build", lambda self, config: [])
    args = Namespace(unpadded_vocab_size=7, ckpt_fully_parallel_load=False)
    checkpoint = SimpleNamespace(path=Path("runs/x/iter_0000003"))
    with pytest.raises(
        CheckpointError, match=f"^--model runs/x/iter_0000003: expected .*{message}"
    ):
        FrozenModel(None, args=args, checkpoint=checkpoint, flag="--model")
    with pytest.raises(CheckpointError, match=f"^--reference-load runs/x/iter_.*{message}"):
        FrozenReference(None, args=args, source=Namespace(checkpoint=checkpoint))


def test_rows_of_the_vocabulary_may_be_padded_for_another_layout(monkeypatch):
    def embedding(*shape, **more):
        return ShardedTensor.from_rank_offsets("embedding.weight", torch.zeros(shape), **more)

    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 1)
    monkeypatch.setattr(
        torch.distributed, "all_gather_object", lambda parts, own: parts.__setitem__(0, own)
    )
    own = embedding(6, 2, allow_shape_mismatch=True)
    monkeypatch.setattr(FrozenModel, "_shards", lambda self: [own])
    monkeypatch.setattr(frozen, "model_digest", lambda shards, vocab_size: (shards, vocab_size))
    model = object.__new__(FrozenModel)
    model._flag, model._vocab_size = "--model", 5
    model.checkpoint = SimpleNamespace(path=Path("x"))
    model._check_keys({own.key: embedding(8, 2)})
    with pytest.raises(CheckpointError, match=r"of shape \(6, 2\), found \(8, 3\)"):
        model._check_keys({own.key: embedding(8, 3)})
    assert model.compute_digest() == ([own], 5)  # of the rows that are no padding


@pytest.fixture
def reference(monkeypatch):
    """Makes a reference of one chunk, loaded with the digest "a"."""
    chunk = torch.nn.Module()
    chunk.body, chunk.output_layer = torch.nn.Linear(2, 2), torch.nn.Linear(2, 3, bias=False)
    chunk.post_process, chunk.share_embeddings_and_output_weights = True, False
    chunk.requires_grad_(False)

    def load(self, *_, **__):
        self.digest, self.chunks = "a", [chunk]

    def make(recorded, **options):
        checkpoint = SimpleNamespace(path=Path("there"))
        source = Namespace(checkpoint=checkpoint, recorded_digest=recorded)
        return FrozenReference(None, args=Namespace(load="run"), source=source, **options)

    monkeypatch.setattr(FrozenModel, "__init__", load)
    return make


def test_other_weights_than_the_run_began_with_are_refused(reference):
    with pytest.raises(CheckpointError, match="digest b, which run was unlearned against, found a"):
        reference("b")
    for fits in (None, "a"):
        assert reference(fits).digest == "a"


def test_all_weights_but_the_output_layers_visit_the_device(reference):
    """The student's head reads that one in between."""
    for offload in (False, True):
        found = reference(None, offload=offload)
        away = {name: p.data_ptr() for name, p in found.chunks[0].named_parameters()}
        with found._on_device():
            inside = {name: p.data_ptr() for name, p in found.chunks[0].named_parameters()}
        moved = {name for name in away if away[name] != inside[name]}
        assert moved == ({"body.weight", "body.bias"} if offload else set())
