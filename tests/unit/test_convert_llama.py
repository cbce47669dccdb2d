"""The Llama architecture between a Hugging Face config and Megatron's flags, and what is refused."""

import argparse
import json
import sys
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_ext.conversion import from_huggingface, huggingface
from megatron_ext.conversion.families import FAMILIES
from megatron_ext.conversion.llama import LlamaLike
from megatron_ext.conversion.rotation import LLAMA3_ROPE
from megatron_ext.conversion.safetensors import SafetensorsReader
from megatron_ext.conversion.to_huggingface import export_model
from megatron_ext.exceptions import CheckpointError, ConfigError
from tests.helpers import llama

ROPE = llama.LLAMA3


def arguments(model, **changes):
    """Megatron's arguments of a model's flags, as a checkpoint holds them."""
    from megatron.training.arguments import parse_args

    words = [word for flag in model.to_flags() for word in flag]
    with mock.patch.object(sys, "argv", ["test", *words]):
        args = parse_args()
    return argparse.Namespace(**vars(args) | changes)


@pytest.mark.parametrize("name", llama.CASES)
def test_config_flags_arguments_and_config_say_the_same(name):
    model = LlamaLike.from_config(llama.config(**llama.CASES[name]))
    again = LlamaLike.from_arguments(
        arguments(model), vocab_size=model.vocab_size, family=model.family
    )
    assert again == model
    config = llama.config(model_type=model.family.name, **model.to_config())
    assert LlamaLike.from_config(config) == model


def test_old_spellings_of_the_rotary_fields_are_read():
    old = {key: value for key, value in ROPE.items() if key != "rope_theta"}
    config = llama.config(rope_theta=50000.0, rope_scaling=old)
    model = LlamaLike.from_config(config)
    assert (model.rotary_base, model.rope_scaling_factor) == (50000, 4.0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_act": "gelu"}, "hidden_act: expected silu, found gelu"),
        ({"architectures": ["LlamaForTokenClassification"]}, "architectures: .*ForTokenClass"),
        (
            {"model_type": "mistral", "sliding_window": 255},
            "sliding_window: expected null, or at least max_position_embeddings 256, found 255",
        ),
        (
            {"model_type": "qwen2", "use_sliding_window": True, "max_window_layers": 2},
            "layer_types: expected full_attention in every layer, found sliding_attention",
        ),
        ({"model_type": "qwen2", "is_causal": False}, "is_causal: expected True, found False"),
        ({"quantization_config": {"bits": 4}}, "quantization_config: expected None, found .*bits"),
        (
            {"model_type": "qwen3_moe", "decoder_sparse_step": 2},
            "decoder_sparse_step: expected 1, found 2",
        ),
        (
            {"model_type": "mixtral", "num_experts_per_tok": 1},
            "num_experts_per_tok: expected at least 2 where their weights sum to 1, found 1",
        ),
        (
            {"model_type": "qwen3_moe", "mlp_only_layers": [0]},
            r"mlp_only_layers: expected \[\], found \[0\]",
        ),
        ({"mlp_bias": True}, "mlp_bias: expected False where attention_bias is False, found True"),
        ({"num_key_value_heads": 3}, "num_key_value_heads: expected a divisor of .* 4, found 3"),
        (
            {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4 + 0.5}},
            "rope_theta: expected a whole number.*, found 10000.5",
        ),
        (
            {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}},
            "rope_parameters.rope_type: expected default or llama3, found linear",
        ),
        *(
            (
                {"rope_parameters": ROPE | {field: value * 2}},
                rf"rope_parameters\.{field}: expected {value}.*, found {value * 2}",
            )
            for field, value in LLAMA3_ROPE.items()
        ),
    ],
)
def test_a_config_that_does_not_fit_is_refused_by_its_field(changes, message):
    with pytest.raises(CheckpointError, match=message):
        LlamaLike.from_config(llama.config(**changes))


@pytest.mark.parametrize(
    ("name", "value", "flag"),
    [
        ("normalization", "LayerNorm", "--normalization"),
        ("swiglu", False, "--swiglu"),
        ("position_embedding_type", "learned_absolute", "--position-embedding-type"),
        ("rotary_percent", 0.5, "--rotary-percent"),
        ("rotary_interleaved", True, "--rotary-interleaved"),
        ("layernorm_zero_centered_gamma", True, "--apply-layernorm-1p"),
    ],
)
def test_arguments_that_do_not_fit_are_refused_by_their_flag(name, value, flag):
    args = arguments(LlamaLike.from_config(llama.config()), **{name: value})
    with pytest.raises(CheckpointError, match=f"{flag}: expected .*, found {value}"):
        LlamaLike.from_arguments(args, vocab_size=500)


@pytest.mark.parametrize(
    ("name", "value", "flag"),
    [
        ("moe_layer_freq", [0, 1, 1, 1], "--moe-layer-freq"),
        ("moe_shared_expert_intermediate_size", 64, "--moe-shared-expert-intermediate-size"),
        ("moe_router_score_function", "sigmoid", "--moe-router-score-function"),
        ("moe_router_load_balancing_type", "sinkhorn", "--moe-router-load-balancing-type"),
        (
            *("moe_router_load_balancing_type", "quantile_balancing"),
            "--moe-router-load-balancing-type",
        ),
        ("moe_mlp_glu_interleave_size", 32, "--moe-mlp-glu-interleave-size"),
        ("qk_layernorm", False, "--num-experts"),  # and Mixtral has no shares of all experts
        ("add_bias_linear", True, "--num-experts"),
    ],
)
def test_mixtures_that_no_family_has_are_refused_by_their_flag(name, value, flag):
    model = LlamaLike.from_config(llama.config(**llama.CASES["qwen3_moe_shares"]))
    LlamaLike.from_arguments(arguments(model), vocab_size=500)
    with pytest.raises(CheckpointError, match=f"^{flag}: expected .*, found "):
        LlamaLike.from_arguments(arguments(model, **{name: value}), vocab_size=500)


@pytest.mark.parametrize(
    "changes",
    [
        {"model_type": "mistral", "sliding_window": 256},
        {"model_type": "mistral", "mlp_bias": True},
        {"model_type": "qwen2", "use_sliding_window": True, "max_window_layers": 4},
        {"model_type": "qwen2", "attention_bias": False},
        {"model_type": "llama", "sliding_window": 8},
    ],
)
def test_fields_that_transformers_does_not_act_on_are_not_refused(changes):
    without = {"model_type": changes["model_type"], "sliding_window": None}
    expected = LlamaLike.from_config(llama.config(**without))
    assert LlamaLike.from_config(llama.config(**changes)) == expected


def test_rows_are_those_of_an_imported_model_and_not_of_a_tokenizer_from_another(tmp_path):
    source = llama.save(tmp_path / "source", vocab_size=650)
    from_huggingface.import_model(source, tmp_path / "ours")
    tokenizer = llama.save(tmp_path / "other", model_type="mistral", vocab_size=600)
    for kept, family, rows in (
        (tmp_path / "ours" / "huggingface", "llama", 650),
        (tokenizer, "mistral", 600),
    ):
        export_model(tmp_path / "ours", tmp_path / family, tokenizer=kept)
        found = json.loads((tmp_path / family / "config.json").read_text())
        assert (found["model_type"], found["vocab_size"]) == (family, rows)
    file = tmp_path / "tokenizer.model"
    file.write_bytes(b"SentencePiece")
    with pytest.raises(
        ConfigError, match=r"^--tokenizer: expected the folder .* found a file, \S+$"
    ):
        export_model(tmp_path / "ours", tmp_path / "back", tokenizer=file)
    qwen = llama.save(tmp_path / "qwen", model_type="qwen3", head_dim=8, vocab_size=600)
    export_model(tmp_path / "ours", tmp_path / "back", tokenizer=qwen)
    found = json.loads((tmp_path / "back" / "config.json").read_text())
    assert (found["model_type"], found["vocab_size"]) == ("llama", llama.TOKENS)


@pytest.mark.parametrize(
    ("changes", "preferred", "expected"),
    [
        ({}, None, "llama"),
        ({}, "mistral", "mistral"),
        ({}, "qwen3", "llama"),
        ({"add_qkv_bias": True}, None, "llama"),
        ({"add_qkv_bias": True}, "qwen2", "qwen2"),
        ({"qk_layernorm": True}, "llama", "qwen3"),
        ({"num_experts": 8}, "llama", "mixtral"),
        ({"no_rope_freq": 2}, "llama", "smollm3"),
        ({"no_rope_freq": [0, 0, 0, 0]}, "smollm3", "smollm3"),
        ({"no_rope_freq": [0, 0, 0, 0]}, None, "llama"),
        ({"num_experts": 8, "qk_layernorm": True}, None, "qwen3_moe"),
    ],
)
def test_a_trained_model_becomes_the_architecture_that_holds_it(changes, preferred, expected):
    args = arguments(LlamaLike.from_config(llama.config()), **changes)
    family = FAMILIES[preferred] if preferred else None
    assert LlamaLike.from_arguments(args, vocab_size=500, family=family).family.name == expected


def test_norms_of_queries_beside_biases_everywhere_are_in_no_architecture():
    model = LlamaLike.from_config(llama.config(**llama.CASES["all_biases"]))
    args = arguments(model, qk_layernorm=True)
    with pytest.raises(CheckpointError, match="--qk-layernorm: expected --disable-bias-linear"):
        LlamaLike.from_arguments(args, vocab_size=500)


def test_another_architecture_is_refused_before_it_is_read(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "gemma3", "hidden_size": 8}')
    with pytest.raises(CheckpointError, match=r"expected one of llama, .* found gemma3"):
        huggingface.read_config(tmp_path)
    with pytest.raises(CheckpointError, match=r"found no .*config\.json"):
        huggingface.read_config(tmp_path / "nowhere")
    (tmp_path / "config.json").write_text('{"model_type": "llama", "hidden_size": "wide"}')
    with pytest.raises(CheckpointError, match=r"config\.json cannot be read: .*hidden_size"):
        huggingface.read_config(tmp_path)


def change(weights, name, value):
    if value is None:
        del weights[name]
    else:
        weights[name] = value


@pytest.mark.parametrize(
    ("config", "name", "value", "message"),
    [
        ({}, "model.norm.weight", None, "lacks 1 tensors, model.norm.weight"),
        ({}, "model.layers.0.self_attn.q_norm.weight", torch.ones(8), "beyond its config.*q_norm"),
        (
            {},
            "model.layers.3.mlp.up_proj.weight",
            torch.ones(80, 31),
            r"source: expected .*up_proj.weight of shape \(80, 32\), as config.json .* \(80, 31\)",
        ),
        ({}, "model.norm.weight", torch.ones(32).half(), "source: dtype: .* F16, F32; .*--dtype"),
        (
            {"tie_word_embeddings": True},
            "lm_head.weight",
            torch.ones(500, 32),
            "config.json: tie_word_embeddings: expected lm_head.weight to be",
        ),
        (
            {"attention_bias": True},
            "model.layers.2.self_attn.o_proj.bias",
            torch.ones(32),
            "config.json: attention_bias: expected model.layers.2.self_attn.o_proj.bias to be zero",
        ),
    ],
)
def test_weights_that_do_not_fit_leave_no_checkpoint(tmp_path, config, name, value, message):
    source = llama.save(tmp_path / "source", **config)
    weights = load_file(source / "model.safetensors")
    change(weights, name, value)
    save_file(weights, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=message):
        from_huggingface.import_model(source, tmp_path / "output")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_tokenizer_beyond_the_embedding_is_refused(tmp_path):
    source = llama.save(tmp_path / "source", vocab_size=499)
    with pytest.raises(
        CheckpointError, match=r"config.json: vocab_size: .* least the 500 .* found 499"
    ):
        from_huggingface.import_model(source, tmp_path / "output")


def test_the_flags_of_an_import_are_read_by_white_space(tmp_path):
    """As `$(cat ARGS.txt)` reads them: by no white space in a path, and by no quotes around one."""
    source = llama.save(tmp_path / "source")
    with pytest.raises(
        ConfigError, match=r"--output: expected a path without white space, .*'.*/h f'"
    ):
        from_huggingface.import_model(source, tmp_path / "h f")
    assert not (tmp_path / "h f").exists()
    from_huggingface.import_model(source, tmp_path / "größe")
    words = (tmp_path / "größe" / "ARGS.txt").read_text().split()
    kept = words[words.index("--tokenizer-model") + 1]
    assert kept == str(tmp_path / "größe" / "huggingface")


def test_missing_weights_and_tokenizer_are_named(tmp_path):
    source = llama.save(tmp_path / "source")
    (source / "tokenizer.json").rename(source / "tokenizer.gone")
    (source / "model.safetensors").rename(source / "pytorch_model.bin")
    with pytest.raises(
        ConfigError, match=f"--source: expected .* tokenizer .*, found none in {source}"
    ):
        from_huggingface.import_model(source, tmp_path / "output")
    with pytest.raises(CheckpointError, match=f"{source}: expected model.safetensors or"):
        SafetensorsReader(source)
    (source / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(CheckpointError, match=f"{source}: weights cannot be read"):
        SafetensorsReader(source)
