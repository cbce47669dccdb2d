"""The tensors of a Llama or its like: which of Megatron's are made of which of Hugging Face's, and how."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from megatron_ext.conversion.llama import LlamaLike


@dataclass(frozen=True)
class Part:
    """One tensor of a Megatron checkpoint (of one layer, if it is stacked) and what it is made of.

    Attributes:
        key: name in the checkpoint.
        place: of a stacked tensor, index and size of each leading axis: the layer, and the expert.
        names: the Hugging Face tensors.
        shapes: their shapes.
        kind: laid one behind the other, interleaved by query group, or padded with rows of zeros.
    """

    key: str
    place: tuple[tuple[int, int], ...]
    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    kind: Literal["plain", "qkv", "vocabulary"] = "plain"


def parts(model: LlamaLike) -> Iterator[Part]:
    """Every tensor of a model, in the order of a forward pass."""
    hidden = (model.hidden_size,)
    table = ((model.vocab_size, model.hidden_size),)
    embedding = ("model.embed_tokens.weight",)
    yield Part("embedding.word_embeddings.weight", (), embedding, table, "vocabulary")
    for layer in range(model.num_layers):
        yield from _layer_parts(model, layer)
    yield Part("decoder.final_layernorm.weight", (), ("model.norm.weight",), (hidden,))
    if not model.tied:
        yield Part("output_layer.weight", (), ("lm_head.weight",), table, "vocabulary")


def _layer_parts(model: LlamaLike, layer: int) -> Iterator[Part]:
    hidden, ffn = model.hidden_size, model.ffn_hidden_size
    query = model.num_attention_heads * model.kv_channels
    key_value = model.num_query_groups * model.kv_channels
    attention, mlp = "self_attention.linear_", "mlp.linear_"
    qkv, gate_up = ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")

    def part(
        key: str,
        room: str,
        names: Sequence[str],
        suffix: str,
        *shapes: tuple[int, ...],
        expert: tuple[tuple[int, int], ...] = (),
    ) -> Part:
        full = tuple(f"model.layers.{layer}.{room}{name}{suffix}" for name in names)
        kind: Literal["plain", "qkv"] = "qkv" if names is qkv else "plain"
        place = ((layer, model.num_layers), *expert)
        return Part(f"decoder.layers.{key}", place, full, shapes, kind)

    def linear(
        key: str, room: str, names: Sequence[str], *shapes: tuple[int, ...], bias: bool
    ) -> Iterator[Part]:
        yield part(f"{key}.weight", room, names, ".weight", *shapes)
        if bias:
            yield part(f"{key}.bias", room, names, ".bias", *(shape[:1] for shape in shapes))

    # Norms are stored under the linear layer that follows them, for every layer spec.
    yield part(f"{attention}qkv.layer_norm_weight", "", ("input_layernorm",), ".weight", (hidden,))
    shapes = ((query, hidden), (key_value, hidden), (key_value, hidden))
    yield from linear(f"{attention}qkv", "self_attn.", qkv, *shapes, bias=model.bias != "none")
    if model.family.qk_norm:
        for letter in "qk":
            key, head = f"self_attention.{letter}_layernorm.weight", (model.kv_channels,)
            yield part(key, "self_attn.", (f"{letter}_norm",), ".weight", head)
    everywhere = model.bias == "all"
    output = (hidden, query)
    yield from linear(f"{attention}proj", "self_attn.", ("o_proj",), output, bias=everywhere)
    name = ("post_attention_layernorm",)
    if (experts := model.experts) is not None and (mixture := model.family.mixture) is not None:
        yield part("pre_mlp_layernorm.weight", "", name, ".weight", (hidden,))
        router = (experts.number, hidden)
        yield part("mlp.router.weight", mixture.room, ("gate",), ".weight", router)
        wide, narrow = (experts.ffn_hidden_size, hidden), (hidden, experts.ffn_hidden_size)
        gate, up, down = mixture.projections
        for i in range(experts.number):
            room, place = f"{mixture.room}experts.{i}.", ((i, experts.number),)
            fc = "mlp.experts.experts.linear_fc"
            yield part(f"{fc}1.weight", room, (gate, up), ".weight", wide, wide, expert=place)
            yield part(f"{fc}2.weight", room, (down,), ".weight", narrow, expert=place)
        return
    yield part(f"{mlp}fc1.layer_norm_weight", "", name, ".weight", (hidden,))
    yield from linear(f"{mlp}fc1", "mlp.", gate_up, (ffn, hidden), (ffn, hidden), bias=everywhere)
    yield from linear(f"{mlp}fc2", "mlp.", ("down_proj",), (hidden, ffn), bias=everywhere)


def zero_shapes(model: LlamaLike) -> dict[str, tuple[int, ...]]:
    """Hugging Face tensors that Megatron has none for, so that they must be, and are written as, zero.

    Llama's `attention_bias` gives the output projection a bias; Megatron's `--add-qkv-bias` does not.
    """
    if model.bias != "qkv" or not model.family.output_bias:
        return {}
    names = (f"model.layers.{layer}.self_attn.o_proj.bias" for layer in range(model.num_layers))
    return dict.fromkeys(names, (model.hidden_size,))


def megatron_shape(part: Part, *, rows: int) -> tuple[int, ...]:
    """Shape of a part without the axes it is stacked on; `rows` are those of a padded vocabulary."""
    first = rows if part.kind == "vocabulary" else sum(shape[0] for shape in part.shapes)
    return (first, *part.shapes[0][1:])


def join(part: Part, tensors: Sequence[Tensor], *, groups: int, rows: int) -> Tensor:
    """Make a part of Hugging Face tensors.

    Args:
        part: the part.
        tensors: of its `shapes`.
        groups: query groups of the model; each holds its query heads, then its key, then its value.
        rows: rows of a padded vocabulary.

    Returns:
        Tensor of `megatron_shape`; the very tensor where nothing has to be done.
    """
    if part.kind == "qkv":
        return torch.cat([t.unflatten(0, (groups, -1)) for t in tensors], dim=1).flatten(0, 1)
    if part.kind == "vocabulary" and rows > tensors[0].shape[0]:
        return functional.pad(tensors[0], (0, 0, 0, rows - tensors[0].shape[0]))
    return tensors[0] if len(tensors) == 1 else torch.cat(list(tensors))


def split(part: Part, tensor: Tensor, *, groups: int) -> list[Tensor]:
    """The Hugging Face tensors of a part, contiguous; the reverse of `join`."""
    sizes = [shape[0] for shape in part.shapes]
    if part.kind == "qkv":
        by_group = tensor.unflatten(0, (groups, -1))
        split_groups = by_group.split([size // groups for size in sizes], dim=1)
        return [t.flatten(0, 1).contiguous() for t in split_groups]
    return [t.contiguous() for t in tensor[: sum(sizes)].split(sizes)]
