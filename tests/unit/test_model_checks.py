"""What the torch-native layers refuse, before anything is built."""

from dataclasses import fields
from types import SimpleNamespace

import pytest
import torch
from megatron.core.transformer import TransformerConfig

from megatron_ext.exceptions import ConfigError
from megatron_ext.model.layer_spec import (
    UNSUPPORTED,
    check_config,
    torch_native_layer_spec,
)

# Of fields that may be set to something else.
VALUES = {
    "softmax_type": "learnable",
    "cuda_graph_impl": "transformer_engine",
}


def _config(**changes):
    plain = {"softmax_type": "vanilla", "cuda_graph_impl": "none", "num_moe_experts": 4}
    plain |= {"moe_grouped_gemm": False}
    return SimpleNamespace(**(plain | changes))


def test_a_plain_config_passes():
    check_config(_config())


@pytest.mark.parametrize("field", UNSUPPORTED)
def test_each_unsupported_field_is_named_and_exists(field):
    assert field in {f.name for f in fields(TransformerConfig)}
    with pytest.raises(ConfigError) as error:
        check_config(_config(**{field: VALUES.get(field, True)}))
    assert UNSUPPORTED[field] in str(error.value)


def test_the_message_lists_all_problems():
    cfg = _config(window_size=(8, 0), softmax_type="learnable", fp8="hybrid")
    with pytest.raises(ConfigError, match=r"--window-size.*; fp8; .* found learnable"):
        check_config(cfg)


def test_biases_are_refused_of_experts_only():
    check_config(_config(num_moe_experts=None, add_bias_linear=True))
    with pytest.raises(ConfigError, match="--num-experts without --disable-bias-linear"):
        check_config(_config(add_bias_linear=True))


def test_a_stage_builds_its_own_layers_only():
    cfg = TransformerConfig(
        num_layers=8,
        hidden_size=8,
        num_attention_heads=2,
        pipeline_model_parallel_size=2,
        virtual_pipeline_model_parallel_size=2,
        pipeline_dtype=torch.float32,
    )
    for stage in (0, 1):
        spec = torch_native_layer_spec(cfg, vp_stage=stage, pp_rank=1)
        assert len(spec.submodules.layer_specs) == 2
