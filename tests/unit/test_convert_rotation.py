"""Layers whose queries and keys are not rotated, as SmolLM3's config and as Megatron's flag."""

import pytest
from megatron.training.arguments import no_rope_freq_type

from megatron_ext.conversion.llama import LlamaLike
from megatron_ext.exceptions import CheckpointError
from tests.helpers import llama
from tests.unit.test_convert_llama import arguments


@pytest.mark.parametrize(
    ("rotated", "flag", "argument"),
    [
        ([1, 0, 1, 0], "2", 2),
        ([0, 0, 0, 0], "1", 1),
        ([1, 1, 1, 0], "4", "[0]*3+[1]"),
        ([1, 1, 0, 1], "[0,0,1,0]", "[0]*2+[1,0]"),
        ([0, 1, 1, 0, 7], "[1,0,0,1]", None),  # of a longer model
        ([1, 1, 1, 1], None, None),
    ],
)
def test_layers_without_rotation_are_the_same_on_both_sides(rotated, flag, argument):
    model = LlamaLike.from_config(llama.config("smollm3", no_rope_layers=rotated))
    flags = {name: values for name, *values in model.to_flags()}
    assert flags.get("--no-rope-freq") == (None if flag is None else [flag])
    values = [value for value in (flag, argument) if value is not None]
    for parsed in map(no_rope_freq_type, values):
        args = arguments(model, no_rope_freq=parsed)
        assert LlamaLike.from_arguments(args, vocab_size=model.vocab_size) == model
    assert model.to_config()["no_rope_layers"] == [min(one, 1) for one in rotated[:4]]


def test_layers_without_rotation_that_no_architecture_has_are_refused():
    full = ["full_attention"] * 4
    with pytest.raises(CheckpointError, match=r"no_rope_layers: expected one for each of 4 .* 3"):
        LlamaLike.from_config(llama.config("smollm3", no_rope_layers=[1, 0, 1], layer_types=full))
    model = LlamaLike.from_config(llama.config("qwen3", head_dim=16))
    with pytest.raises(CheckpointError, match="--no-rope-freq: expected neither --qk-layernorm"):
        LlamaLike.from_arguments(arguments(model, no_rope_freq=2), vocab_size=500)
