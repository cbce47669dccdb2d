"""Empty extra states of norms: written for stock Megatron, read where they must be, and never kept."""

from types import SimpleNamespace

import pytest
import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing import serialization
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor
from megatron.training import checkpointing

from megatron_ext.runtime import resume

WEIGHT, EXTRA = "decoder.final_layernorm.weight", "decoder.final_layernorm._extra_state"


def state():
    """Of a model of one norm."""
    return {"model": {WEIGHT: ShardedTensor.from_rank_offsets(WEIGHT, torch.ones(2))}}


def test_a_save_has_one_of_each_norm(monkeypatch):
    saved = []
    monkeypatch.setattr(dist_checkpointing, "save", lambda given, path: saved.append((given, path)))
    resume.complete_saves()
    dist_checkpointing.save(state(), "there")
    ((given, path),) = saved
    assert path == "there"
    assert list(given["model"]) == [WEIGHT, EXTRA]
    assert given["model"][EXTRA].key == EXTRA
    assert given["model"][EXTRA].data is None


@pytest.mark.parametrize(
    ("strictness", "stored", "asked"),
    [
        ("raise_all", True, [WEIGHT, EXTRA]),
        ("raise_all", False, [WEIGHT]),
        ("assume_ok_unexpected", True, [WEIGHT]),
    ],
)
def test_a_load_gives_a_model_no_state_that_it_has_not(monkeypatch, strictness, stored, asked):
    """What nobody asks for is refused by all strictnesses but one; a model takes only what it has."""
    unique = ShardedObject(EXTRA, None, (1,), (0,)).unique_key
    present = {unique: None} if stored else {}
    found = []

    def load(load_dir, args, rank0, given, iteration, release):
        found.extend(given["model"])
        return {"model": dict.fromkeys(given["model"], 1)}, "name"

    monkeypatch.setattr(serialization, "load_sharded_metadata", lambda path: present)
    monkeypatch.setattr(checkpointing, "_load_global_dist_base_checkpoint", load)
    resume.prepare_loads()
    args = SimpleNamespace(dist_ckpt_strictness=strictness)
    loaded = checkpointing._load_global_dist_base_checkpoint("d", args, False, state(), 4, False)
    assert found == asked
    assert loaded == ({"model": {WEIGHT: 1}}, "name")
