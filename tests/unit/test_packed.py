"""Parameters of a padded buffer once its padding is gone."""

from types import SimpleNamespace

import pytest
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

from megatron_ext.runtime import packed
from megatron_ext.runtime.packed import places


def test_each_bucket_moves_up_by_the_padding_before_it():
    # Three buckets that hold 100, 50 + 14 + 30 (starts are aligned to 64 inside too) and 7 elements.
    buckets = [
        SimpleNamespace(offset=0, numel_unpadded=100),
        SimpleNamespace(offset=128, numel_unpadded=94),
        SimpleNamespace(offset=256, numel_unpadded=7),
    ]
    index = {"a": (0, 100, 0), "b": (128, 178, 1), "c": (192, 222, 1), "d": (256, 263, 2)}
    found = places(SimpleNamespace(buckets=buckets, param_index_map=index))
    assert found == {"a": (0, 100, 0), "b": (100, 150, 1), "c": (164, 194, 1), "d": (194, 201, 2)}
    assert list(found) == list(index)


def test_without_padding_nothing_moves():
    buckets = [SimpleNamespace(offset=0, numel_unpadded=128)]
    buckets += [SimpleNamespace(offset=128, numel_unpadded=256)]
    index = {"a": (0, 128, 0), "b": (128, 384, 1)}
    assert places(SimpleNamespace(buckets=buckets, param_index_map=index)) == index


@pytest.mark.parametrize("fails", [False, True])
def test_places_are_packed_while_the_state_is_taken_and_no_longer(monkeypatch, fails):
    """Between two saves gradients and weights lie where the buffer has them, padding included."""
    name, seen = "sharded_param_state_fully_reshardable", []

    def take(self):
        seen.extend(self.buffers[0].param_index_map.values())
        if fails:
            raise RuntimeError("disk full")
        return "state"

    monkeypatch.setattr(DistributedOptimizer, name, take)
    packed.apply()
    buckets = [SimpleNamespace(offset=0, numel_unpadded=100)]
    buckets += [SimpleNamespace(offset=128, numel_unpadded=7)]
    index = {"a": (0, 100, 0), "b": (128, 135, 1)}
    optimizer = SimpleNamespace(buffers=[SimpleNamespace(buckets=buckets, param_index_map=index)])
    state = getattr(DistributedOptimizer, name)
    if fails:
        with pytest.raises(RuntimeError, match="disk full"):
            state(optimizer)
    else:
        assert state(optimizer) == "state"
    assert seen == [(0, 100, 0), (100, 107, 1)]
    assert optimizer.buffers[0].param_index_map is index
    assert index == {"a": (0, 100, 0), "b": (128, 135, 1)}
