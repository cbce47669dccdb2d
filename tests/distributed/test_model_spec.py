"""The torch-native layers against Megatron's local ones: loss, gradients, checkpoints."""

from typing import Any

import pytest
import torch
from torch.distributed.checkpoint import CheckpointException

from tests.helpers.distributed import run_ranks
from tests.helpers.spec_cases import CASES, TP_CASES


def _distance(ours: dict, theirs: dict) -> float:
    assert ours.keys() == theirs.keys()
    return max(float((ours[n] - theirs[n]).norm() / theirs[n].norm()) for n in theirs)


def _compare(case: dict, *, tensor_parallel: int, sequence_parallel: bool) -> tuple[float, float]:
    from tests.helpers import models

    models.start(tensor_parallel)
    # Megatron's gradient-sum over ranks is what sequence parallelism of ours must equal.
    kept = {key: case[key] for key in case if not key.startswith("recompute_")}
    stock = models.gpt(models.config(**kept), native=False)
    ours = models.gpt(models.config(**case, sequence_parallel=sequence_parallel), native=True)
    ours.load_state_dict(stock.state_dict())
    loss, gradients = models.loss_and_gradients(ours)
    expected_loss, expected = models.loss_and_gradients(stock)
    return abs(loss - expected_loss), _distance(gradients, expected)


def _everything(directory: str) -> dict[str, Any]:
    """All measurements of this file, since starting ranks costs more than any of them."""
    from megatron_ext.runtime import compat, recompute

    compat.read_sizes_and_types()
    recompute.return_copies()
    results: dict[str, Any] = {
        layout: {
            name: _compare(CASES[name], tensor_parallel=tp, sequence_parallel=sp) for name in names
        }
        for layout, tp, sp, names in (
            ("data parallel", 1, False, list(CASES)),
            ("tensor parallel", 2, False, TP_CASES),
            ("sequence parallel", 2, True, TP_CASES),
        )
    }
    results["one group"] = _one_group_over_two_ranks()
    results["unmarked norms"] = _unmarked_norms()
    results["round trips"] = [
        _round_trip(f"{directory}/{save_native}", save_native) for save_native in (False, True)
    ]
    results["keys"] = _keys()
    results["extra states"] = _extra_states(f"{directory}/extra")
    results["dropout"] = _dropout()
    return results


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    directory = tmp_path_factory.mktemp("checkpoints")
    for name in ("False", "True", "extra"):
        (directory / name).mkdir()
    return run_ranks(_everything, 2, str(directory), timeout=300.0)


@pytest.mark.parametrize("layout", ["data parallel", "tensor parallel", "sequence parallel"])
def test_loss_and_gradients_equal_those_of_the_local_spec(results, layout):
    # fp32 sums in another order: a few units in the last place, times the depth of two layers.
    bad = {
        name: found
        for rank in results
        for name, found in rank[layout].items()
        if found[0] > 2e-6 or found[1] > 1e-5
    }
    assert not bad, f"(loss difference, worst relative gradient difference): {bad}"


def _one_group_over_two_ranks() -> list[float]:
    from tests.helpers import models

    results = []
    for size in (1, 2):
        models.start(size)
        model = models.gpt(models.config(num_query_groups=1), native=True)
        if size == 1:
            whole = {n: p.detach().clone() for n, p in model.named_parameters()}
        else:
            rank = torch.distributed.get_rank()
            with torch.no_grad():
                for name, p in model.named_parameters():
                    p.copy_(_shard(name, whole[name], p.shape, rank))
        results.append(models.loss_and_gradients(model)[0])
    return results


def _shard(name: str, whole: torch.Tensor, shape: torch.Size, rank: int) -> torch.Tensor:
    if whole.shape == shape:
        return whole
    if "linear_fc1" in name:  # gate and linear part are each split over the ranks
        return torch.cat([half.chunk(2)[rank] for half in whole.chunk(2)])
    dim = next(i for i, (a, b) in enumerate(zip(whole.shape, shape, strict=True)) if a != b)
    return whole.chunk(2, dim=dim)[rank]


def test_fewer_query_groups_than_ranks(results):
    for whole, split in (rank["one group"] for rank in results):
        assert split == pytest.approx(whole, abs=2e-6)


def _unmarked_norms() -> float:
    from tests.helpers import models

    models.start(2)
    ours = models.gpt(models.config(sequence_parallel=True), native=True)
    _, expected = models.loss_and_gradients(ours)
    wrong = models.gpt(models.config(sequence_parallel=True), native=True)
    for name, parameter in wrong.named_parameters():
        if "norm" in name:
            parameter.sequence_parallel = False
    return _distance(models.loss_and_gradients(wrong)[1], expected)


def test_unmarked_norms_would_keep_partial_gradients(results):
    assert min(rank["unmarked norms"] for rank in results) > 0.1


ALL_PARAMETERS = {"qk_layernorm": True, "add_bias_linear": True, "normalization": "LayerNorm"}


def _round_trip(directory: str, save_native: bool) -> int:
    """Save with one spec at TP 2, load with the other at TP 1; returns the tensors compared."""
    from megatron.core import dist_checkpointing

    from tests.helpers import models

    models.start(2)
    rank = torch.distributed.get_rank()
    saved = models.gpt(models.config(**ALL_PARAMETERS), native=save_native, seed=1 + rank)
    for parameter in saved.parameters():  # what all ranks hold must agree
        if not getattr(parameter, "tensor_model_parallel", False):
            torch.distributed.broadcast(parameter.data, 0)
    dist_checkpointing.save(saved.sharded_state_dict(), directory)
    shards = dict(saved.named_parameters())
    models.start(1)
    loaded = models.gpt(models.config(**ALL_PARAMETERS), native=not save_native, seed=9)
    state = dist_checkpointing.load(loaded.sharded_state_dict(), directory)
    loaded.load_state_dict(state)
    whole = dict(loaded.named_parameters())
    ours = {n: _shard(n, whole[n], shard.shape, rank) for n, shard in shards.items()}
    theirs = shards
    assert ours.keys() == theirs.keys()
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=0, msg=name)
    return len(theirs)


def test_checkpoints_of_the_local_spec_load_and_back(results):
    assert [rank["round trips"] for rank in results] == [[36, 36], [36, 36]]


def _keys() -> set[str]:
    from tests.helpers import models

    models.start()
    state = models.gpt(models.config(**ALL_PARAMETERS), native=True).sharded_state_dict()
    return {value.key for key, value in state.items() if "_extra_state" not in key}


def test_checkpoint_keys_are_those_of_the_transformer_engine_spec(results):
    """There TELayerNormColumnParallelLinear holds the norms as `layer_norm_weight` and `_bias`."""
    affine = ("weight", "bias")
    attention = {
        f"{part}{name}"
        for part in ("linear_qkv.layer_norm_", "linear_qkv.", "linear_proj.")
        for name in affine
    } | {f"{part}_layernorm.{name}" for part in "qk" for name in affine}
    feed_forward = {
        f"{part}{name}"
        for part in ("linear_fc1.layer_norm_", "linear_fc1.", "linear_fc2.")
        for name in affine
    }
    layer = {f"decoder.layers.self_attention.{name}" for name in attention}
    layer |= {f"decoder.layers.mlp.{name}" for name in feed_forward}
    model = {
        "embedding.word_embeddings.weight",
        "decoder.final_layernorm.weight",
        "decoder.final_layernorm.bias",
        "output_layer.weight",
    }
    assert results[0]["keys"] == layer | model


def _extra_states(directory: str) -> dict[str, Any]:
    """Written beside the weights at TP 2; then asked for by layers, one of which the checkpoint lacks."""
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.mapping import ShardedObject
    from megatron.core.dist_checkpointing.serialization import load_sharded_metadata

    from megatron_ext.checkpoint.extra_state import add_empty, keep_own
    from tests.helpers import models

    models.start(2)
    saved = {"model": models.gpt(models.config(**ALL_PARAMETERS), native=True).sharded_state_dict()}
    add_empty(saved)
    dist_checkpointing.save(saved, directory)
    written = {v.unique_key for v in saved["model"].values() if isinstance(v, ShardedObject)}

    def wanted(model: Any) -> dict[str, Any]:
        lacking = "decoder.layers.new._extra_state"
        own = ShardedObject(lacking, b"own", (1,), (0,), replica_id=torch.distributed.get_rank())
        return {"model": {**model.sharded_state_dict(), lacking: own}}

    loaded = models.gpt(models.config(**ALL_PARAMETERS), native=True, seed=9)
    try:
        dist_checkpointing.load(wanted(loaded), directory)
        error = ""
    except CheckpointException as raised:
        error = str(raised)
    state = wanted(loaded)
    keep_own(state, load_sharded_metadata(directory))
    found = dist_checkpointing.load(state, directory)["model"]
    kept = found.pop("decoder.layers.new._extra_state")
    loaded.load_state_dict(found, strict=True)
    return {"written": written, "error": error, "kept": kept}


def test_extra_states_are_those_of_the_transformer_engine_spec(results):
    """As version 2.20 asks for them, read from its layers built by Megatron's spec."""
    parts = ("self_attention.linear_qkv", "self_attention.linear_proj")
    parts = (*parts, "self_attention.q_layernorm", "self_attention.k_layernorm")
    parts = (*parts, "mlp.linear_fc1", "mlp.linear_fc2")
    expected = {
        f"decoder.layers.{part}._extra_state/shard_{layer}_2" for part in parts for layer in (0, 1)
    }
    expected |= {"decoder.final_layernorm._extra_state/shard_0_1"}
    for rank in results:
        assert rank["extra states"]["written"] == expected


def test_a_layer_keeps_the_extra_state_that_a_checkpoint_lacks(results):
    for rank in results:
        assert "decoder.layers.new._extra_state" in rank["extra states"]["error"]
        assert rank["extra states"]["kept"] == b"own"


def _dropout() -> tuple[bool, bool, bool]:
    from tests.helpers import models

    models.start()
    model = models.gpt(models.config(attention_dropout=0.5), native=True)
    first, second = (models.loss_and_gradients(model)[0] for _ in range(2))
    model.eval()
    third, fourth = (models.loss_and_gradients(model)[0] for _ in range(2))
    return first != second, third == fourth, first != third


def test_attention_dropout_acts_in_training_only(results):
    assert [rank["dropout"] for rank in results] == [(True, True, True)] * 2
