"""What is taken from Megatron's arguments by name: the compared architecture, and the model's config."""

import json
import subprocess
import sys
from argparse import Namespace

import pytest

from megatron_ext.checkpoint.inspect import ARCHITECTURE, flag_of
from tests.helpers.entry import ROOT

# In a process of its own: the CPU runtime changes torch for good.
PARSE = """
import json, sys
from argparse import ArgumentParser
from megatron_ext.runtime import cpu
cpu.enable()
from megatron.training.argument_utils import gpt_config_from_args
from megatron.training.arguments import add_megatron_arguments, parse_args, validate_args
from megatron_ext.arguments import machine_defaults
from megatron_ext.exceptions import ConfigError
from megatron_ext.model.layer_spec import torch_native_spec_for_builder
from megatron_ext.model.model_config import model_config_from_args

def config(*flags):
    sys.argv = ["x", "--num-layers", "2", "--hidden-size", "32", "--num-attention-heads", "4"]
    sys.argv += ["--seq-length", "8", "--max-position-embeddings", "8", "--micro-batch-size", "1"]
    sys.argv += ["--vocab-size", "64", "--train-iters", "1", "--lr", "1", *flags]
    sys.argv += ["--transformer-impl", "local"]
    def defaults(parser):
        parser.set_defaults(**machine_defaults())
        return parser
    args = parse_args(defaults)
    validate_args(args)
    ours = model_config_from_args(args)
    theirs = gpt_config_from_args(args)
    same = {k: v for k, v in vars(ours).items() if k not in ("transformer", "transformer_layer_spec",
            "rope_scaling_factor")}
    return {
        "factor": [theirs.rope_scaling_factor, ours.rope_scaling_factor],
        "torch-native": ours.transformer_layer_spec is torch_native_spec_for_builder,
        "others": all(getattr(theirs, k) == v for k, v in same.items()),
        "layers": ours.transformer.num_layers,
        "fused": ours.transformer.bias_activation_fusion,
    }

def refused(*flags):
    try:
        config(*flags)
    except ConfigError as error:
        return str(error)

flags = {}
for action in add_megatron_arguments(ArgumentParser(allow_abbrev=False))._actions:
    flags.setdefault(action.dest, []).extend(action.option_strings)
result = {
    "flags": flags,
    "llama": config("--use-rope-scaling", "--rope-scaling-factor", "32", "--position-embedding-type",
                    "rope"),
    "own spec": config("--spec", "megatron.core.models.gpt.gpt_layer_specs", "get_gpt_layer_local_spec"),
    "activations": [config(*flags)["fused"] for flags in ([], ["--squared-relu"], ["--quick-geglu"])],
    "one expert a token": refused("--num-experts", "2", "--moe-router-topk", "1"),
    "interleaved": refused("--position-embedding-type", "rope", "--rotary-interleaved"),
}
print(json.dumps(result))
"""


@pytest.fixture(scope="module")
def parsed():
    result = subprocess.run([sys.executable, "-c", PARSE], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads(result.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", [*ARCHITECTURE, "group_query_attention", "num_query_groups"])
def test_compared_arguments_and_their_flags_are_megatrons(parsed, name):
    assert f"--{flag_of(name)}" in parsed["flags"][name]


def test_the_factor_of_rope_scaling_reaches_the_model(parsed):
    theirs, ours = parsed["llama"]["factor"]
    assert ours == 32
    # Once Megatron hands it on, model_config.py need not.
    assert theirs == 8


def test_local_layers_are_torch_native_unless_a_spec_is_named(parsed):
    assert parsed["llama"]["torch-native"]
    assert not parsed["own spec"]["torch-native"]


def test_what_the_layers_do_not_compute_is_refused_before_any_process_group(parsed):
    assert "(--rotary-interleaved)" in parsed["interleaved"]


def test_an_activation_is_fused_only_where_the_layers_can(parsed):
    assert parsed["activations"] == [True, False, False]


@pytest.mark.parametrize(
    ("changes", "fused"),
    [
        ({}, True),
        ({"moe_layer_freq": [1, 1]}, True),
        # Dense layers, and experts that all tokens have, are Megatron's ordinary MLP.
        ({"moe_layer_freq": [0, 1]}, False),
        ({"moe_layer_freq": 2}, False),
        ({"moe_shared_expert_intermediate_size": 8}, False),
        ({"quick_geglu": False}, False),
        ({"quick_geglu": False, "squared_relu": True}, False),
        ({"quick_geglu": False, "num_experts": None}, True),
        ({"moe_layer_freq": 2, "quick_geglu": False, "swiglu": True}, True),
    ],
)
def test_experts_fuse_another_activation_than_dense_layers(changes, fused):
    from megatron_ext.model.model_config import fuses_activation

    args = {"swiglu": False, "squared_relu": False, "quick_geglu": True, "num_layers": 2}
    args |= {"num_experts": 4, "moe_layer_freq": 1, "moe_shared_expert_intermediate_size": None}
    assert fuses_activation(Namespace(**args | changes)) is fused


def test_what_megatron_refuses_of_a_model_is_one_line(parsed):
    assert parsed["one expert a token"].startswith("refused by Megatron-Core: ")
    assert "--moe-router-pre-softmax" in parsed["one expert a token"]


def test_the_rest_is_megatrons_config(parsed):
    assert parsed["llama"]["others"]
    assert parsed["llama"]["layers"] == 2
