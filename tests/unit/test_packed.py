"""Parameters of a padded buffer once its padding is gone."""

from types import SimpleNamespace

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
