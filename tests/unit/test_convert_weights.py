"""How tensors are laid out on either side, and how they are written and read piece by piece."""

import argparse
import json

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file

from megatron_ext.checkpoint import torch_dist
from megatron_ext.checkpoint.folder import new_folder
from megatron_ext.checkpoint.torch_dist import LazyTensor
from megatron_ext.conversion.llama import LlamaLike
from megatron_ext.conversion.safetensors import INDEX, SafetensorsReader, write_safetensors
from megatron_ext.conversion.weights import join, megatron_shape, parts, split
from megatron_ext.exceptions import CheckpointError, ConfigError
from tests.helpers import llama


def part(name, **changes):
    model = LlamaLike.from_config(llama.config(**changes))
    (found,) = (
        p for p in parts(model) if p.key.endswith(name) and not any(index for index, _ in p.place)
    )
    return found


def rows(*numbers):
    """A matrix whose rows hold these numbers."""
    return torch.tensor(numbers, dtype=torch.float32)[:, None].expand(-1, 32).contiguous()


def test_each_group_holds_its_query_heads_then_its_key_then_its_value():
    # Two groups of two query heads; heads of one row would be odd, so each has two.
    qkv = part("linear_qkv.weight", num_key_value_heads=2, head_dim=2)
    query = rows(0, 0.5, 1, 1.5, 2, 2.5, 3, 3.5)
    key, value = rows(10, 10.5, 11, 11.5), rows(20, 20.5, 21, 21.5)
    joined = join(qkv, [query, key, value], groups=2, rows=0)
    expected = [0, 0.5, 1, 1.5, 10, 10.5, 20, 20.5, 2, 2.5, 3, 3.5, 11, 11.5, 21, 21.5]
    assert joined[:, 0].tolist() == expected
    for found, tensor in zip(split(qkv, joined, groups=2), (query, key, value), strict=True):
        assert torch.equal(found, tensor)


def test_the_gate_comes_before_the_linear_half():
    fc1 = part("linear_fc1.weight", intermediate_size=2)
    joined = join(fc1, [rows(0, 1), rows(2, 3)], groups=2, rows=0)
    assert joined[:, 0].tolist() == [0, 1, 2, 3]
    assert [t[:, 0].tolist() for t in split(fc1, joined, groups=2)] == [[0, 1], [2, 3]]


def test_a_vocabulary_is_padded_with_zeros_and_cut():
    embedding = part("word_embeddings.weight", vocab_size=3)
    assert megatron_shape(embedding, rows=4) == (4, 32)
    joined = join(embedding, [rows(1, 2, 3)], groups=2, rows=4)
    assert joined[:, 0].tolist() == [1, 2, 3, 0]
    (cut,) = split(embedding, joined, groups=2)
    assert cut[:, 0].tolist() == [1, 2, 3]


@pytest.mark.parametrize("name", llama.CASES)
def test_the_tensors_are_those_of_transformers(name, tmp_path):
    # Of its files: in memory it holds all experts of a layer in one tensor.
    source = llama.save(tmp_path / "source", **llama.CASES[name])
    stored = load_file(source / "model.safetensors")
    expected = {key: tuple(tensor.shape) for key, tensor in stored.items()}
    model = LlamaLike.from_config(llama.config(**llama.CASES[name]))
    found = {n: s for p in parts(model) for n, s in zip(p.names, p.shapes, strict=True)}
    assert expected.items() >= found.items()
    assert {key.rpartition(".self_attn.")[2] for key in expected.keys() - found.keys()} <= (
        {"o_proj.bias"} if name.endswith("attention_bias") else set()
    )


def lazy(key, layer, tensor, log):
    def make():
        log.append((key, layer))
        return tensor

    return LazyTensor(key, () if layer is None else ((layer, 2),), tuple(tensor.shape), make)


def test_each_tensor_is_made_once_and_read_back_by_layer(tmp_path):
    log = []
    layers = [torch.randn(3, 5), torch.randn(3, 5)]
    final = torch.randn(5)
    tensors = [lazy("stack", i, tensor, log) for i, tensor in enumerate(layers)]
    tensors.append(lazy("decoder.final", None, final, log))
    args = argparse.Namespace(num_layers=2)
    torch_dist.write(tmp_path / "a", tensors, dtype=torch.float32, args=args)
    assert log == [("stack", 0), ("stack", 1), ("decoder.final", None)]
    reader = torch_dist.Reader(tmp_path / "a")
    assert reader.describe("stack") == ((2, 3, 5), torch.float32)
    assert torch.equal(reader.read("stack", 1), layers[1])
    assert torch.equal(reader.read("stack"), torch.stack(layers))
    assert torch.equal(reader.read("decoder.final"), final)
    assert reader.keys(("decoder.",)) == {"decoder.final"}
    with pytest.raises(CheckpointError, match="expected a tensor other, found none"):
        reader.describe("other")


def test_a_stack_that_lacks_a_layer_is_refused(tmp_path):
    tensors = [lazy("stack", 0, torch.ones(2), [])]
    # The writer itself would notice; a checkpoint that lost its second layer later would not.
    torch_dist.write(
        tmp_path / "a",
        [*tensors, lazy("stack", 1, torch.ones(2), [])],
        dtype=torch.float32,
        args=argparse.Namespace(),
    )
    reader = torch_dist.Reader(tmp_path / "a")
    del reader._metadata.state_dict_metadata["stack"].chunks[1]
    assert torch.equal(reader.read("stack", 0), torch.ones(2))
    with pytest.raises(CheckpointError, match="expected all of stack, found parts missing"):
        reader.read("stack", 1)


def test_shards_of_any_layout_are_put_together(tmp_path):
    # As two tensor-parallel ranks store it: halves of each layer, apart.
    whole = torch.randn(2, 4, 3)
    pieces = [
        LazyTensor("stack", (), (1, 2, 3), lambda i=i, j=j: whole[i : i + 1, j : j + 2])
        for i in (0, 1)
        for j in (0, 2)
    ]

    class Halves(torch_dist._LazyPlanner):
        def create_local_plan(self):
            return dcp.planner.SavePlan(items)

    items = []
    for piece, offset in zip(pieces, [(i, j, 0) for i in (0, 1) for j in (0, 2)], strict=True):
        item = piece.write_item(torch.float32)
        size, chunk = torch.Size(whole.shape), item.tensor_data.chunk
        chunk = type(chunk)(offsets=torch.Size(offset), sizes=chunk.sizes)
        data = type(item.tensor_data)(chunk, item.tensor_data.properties, size)
        index = dcp.metadata.MetadataIndex("stack", offset)
        items.append(type(item)(index=index, type=item.type, tensor_data=data))
    planner = Halves([], {}, dtype=torch.float32)
    planner._by_index = {item.index: piece for item, piece in zip(items, pieces, strict=True)}
    writer = dcp.FileSystemWriter(tmp_path)
    dcp.save({}, storage_writer=writer, planner=planner, no_dist=True)
    reader = torch_dist.Reader(tmp_path)
    for layer in (0, 1):
        assert torch.equal(reader.read("stack", layer), whole[layer])


def test_files_are_cut_at_their_size_and_a_large_tensor_has_its_own(tmp_path):
    tensors = {
        name: torch.full((size,), float(size))
        for name, size in zip("abcd", (2, 3, 9, 1), strict=True)
    }
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    limits = {"max_shard_bytes": 20, "dtype": torch.float32}
    write_safetensors(tmp_path, shapes, tensors.items(), **limits)
    index = json.loads((tmp_path / INDEX).read_text())
    assert index["metadata"]["total_size"] == 60
    files = [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    assert list(index["weight_map"].values()) == [files[0], files[0], files[1], files[2]]
    with SafetensorsReader(tmp_path) as reader:
        assert reader.names() == set(tensors)
        for name, tensor in tensors.items():
            assert reader.describe(name) == (shapes[name], "F32")
            assert torch.equal(reader.read(name), tensor)


def test_a_folder_appears_complete_or_not_at_all(tmp_path):
    target = tmp_path / "out"

    def fill_half():
        with new_folder(target, mark="done") as folder:
            (folder / "half").write_text("")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fill_half()
    assert not list(tmp_path.iterdir())
    with new_folder(target, mark="done") as folder:
        (folder / "done").write_text("1")
        assert not target.exists()
    with (
        pytest.raises(ConfigError, match="out exists: give --overwrite"),
        new_folder(target, mark="done"),
    ):
        pass
    with pytest.raises(ZeroDivisionError), new_folder(target, mark="done", overwrite=True):
        raise ZeroDivisionError
    assert (target / "done").read_text() == "1"
    with new_folder(target, mark="done", overwrite=True) as folder:
        (folder / "done").write_text("2")
    assert (target / "done").read_text() == "2"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_folder_of_another_kind_is_never_replaced(tmp_path):
    (tmp_path / "thesis.txt").write_text("")
    with (
        pytest.raises(ConfigError, match=r"expected done in .*, found none; it is not replaced"),
        new_folder(tmp_path, mark="done", overwrite=True),
    ):
        pass
    assert (tmp_path / "thesis.txt").exists()
