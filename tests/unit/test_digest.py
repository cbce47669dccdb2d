import pytest
import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor

from megatron_ext.checkpoint import digest
from megatron_ext.checkpoint.digest import model_digest


def sharded(
    key, data, *, axis=None, index=0, count=1, layer=None, layers=1, replica=0, padded=False
):
    """A shard of a tensor along one axis, stacked over layers if one is given."""
    offsets = [] if layer is None else [(0, layer, layers)]
    prepended = 0 if layer is None else 1
    if axis is not None:
        offsets.append((prepended + axis, index, count))
    return ShardedTensor.from_rank_offsets(
        key,
        data,
        *offsets,
        replica_id=replica,
        prepend_axis_num=prepended,
        allow_shape_mismatch=padded,
    )


def split(key, data, parts, *, axis):
    chunks = data.chunk(parts, dim=axis)
    return [
        sharded(key, chunk.contiguous(), axis=axis, index=i, count=parts)
        for i, chunk in enumerate(chunks)
    ]


@pytest.fixture
def matrix():
    return torch.randn(12, 8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("parts", [2, 4])
def test_shards_add_up_to_the_whole(matrix, dtype, axis, parts):
    data = matrix.to(dtype)
    whole = model_digest([sharded("w", data)], vocab_size=12)
    shards = split("w", data, parts, axis=axis)
    assert model_digest(shards, vocab_size=12) == whole
    assert model_digest(reversed(shards), vocab_size=12) == whole


def test_blocks_of_rows_do_not_matter(matrix, monkeypatch):
    whole = model_digest([sharded("w", matrix)], vocab_size=12)
    monkeypatch.setattr(digest, "_BLOCK_ELEMENTS", 17)
    assert model_digest([sharded("w", matrix)], vocab_size=12) == whole


def test_replicas_count_once(matrix):
    shards = [sharded("w", matrix), sharded("w", matrix, replica=1)]
    assert model_digest(shards, vocab_size=12) == model_digest(shards[:1], vocab_size=12)


def test_padded_rows_do_not_count(matrix):
    longer = torch.cat((matrix, torch.randn(4, 8)))
    expected = model_digest([sharded("e", matrix, padded=True)], vocab_size=12)
    assert model_digest([sharded("e", longer, padded=True)], vocab_size=12) == expected
    assert model_digest([sharded("e", longer)], vocab_size=12) != expected
    # A shard that is padding altogether.
    parts = split("e", torch.cat((matrix, torch.randn(12, 8))), 4, axis=0)
    for part in parts:
        part.allow_shape_mismatch = True
    assert model_digest(parts, vocab_size=12) == expected


def test_layers_are_told_apart(matrix):
    first, second = matrix, matrix + 1

    def stack(*layers):
        return model_digest(
            [sharded("w", x, layer=i, layers=2) for i, x in enumerate(layers)], vocab_size=12
        )

    assert stack(first, second) != stack(second, first)


def test_every_difference_shows(matrix):
    seen = {model_digest([sharded("w", matrix)], vocab_size=12)}
    seen.add(model_digest([sharded("v", matrix)], vocab_size=12))
    for row, column in ((0, 0), (11, 7), (5, 3)):
        changed = matrix.clone()
        changed[row, column] = changed[row, column].nextafter(torch.tensor(9.0))
        seen.add(model_digest([sharded("w", changed)], vocab_size=12))
    swapped = matrix.clone()
    swapped[[0, 1]] = matrix[[1, 0]]
    seen.add(model_digest([sharded("w", swapped)], vocab_size=12))
    seen.add(model_digest([sharded("w", matrix[:, [1, 0, *range(2, 8)]])], vocab_size=12))
    seen.add(model_digest([sharded("w", -matrix)], vocab_size=12))
    assert len(seen) == 8


def test_it_is_the_same_in_every_release():
    # Written into checkpoints: a change here makes every running unlearning run refuse its reference.
    data = torch.arange(6, dtype=torch.float32).view(2, 3) / 7
    assert model_digest([sharded("w", data)], vocab_size=2) == "1b0d9de4175f30f6"
