"""Hugging Face in and out: the same logits, the same bits, and the same architecture in training."""

import filecmp
import json
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.helpers import llama
from tests.helpers.distributed import run_ranks
from tests.helpers.recipes import after, build


def convert_all(directory: str) -> dict[str, torch.Tensor]:
    """On a rank: import every case, export it again, and run what ARGS.txt describes."""
    from tests.helpers.models import start

    start()
    from megatron_ext.conversion.from_huggingface import import_model
    from megatron_ext.conversion.to_huggingface import export_model

    logits = {}
    for name in llama.CASES:
        for kind in ("float32", "bfloat16"):
            folder = Path(directory) / name / kind
            import_model(folder / "source", folder / "megatron")
            export_model(folder / "megatron", folder / "back", max_shard_bytes=50_000)
        logits[name] = megatron_logits(Path(directory) / name / "float32" / "megatron")
    return logits


def megatron_logits(checkpoint: Path) -> torch.Tensor:
    """Logits of a checkpoint under the flags of its ARGS.txt, through the product's spec."""
    from megatron.core.utils import unwrap_model
    from megatron.training.arguments import parse_args, validate_args

    from megatron_ext.arguments import add_arguments
    from megatron_ext.checkpoint.inspect import check_architecture, open_checkpoint
    from megatron_ext.frozen import FrozenModel
    from megatron_ext.model.model_config import model_config_from_args
    from megatron_ext.runtime import compat

    compat.read_sizes_and_types()
    words = (checkpoint / "ARGS.txt").read_text().split()
    sys.argv = ["test", *words, *("--micro-batch-size", "1", "--train-iters", "1", "--lr", "0")]
    args = parse_args(add_arguments)
    validate_args(args)
    args.unpadded_vocab_size, args.tokenizer_digest = llama.TOKENS, None
    args.padded_vocab_size = args.padded_vocab_size or 512  # what Megatron makes of 500 tokens
    opened = open_checkpoint(checkpoint, flag="--load")
    assert opened.args.no_save_optim  # so that no run is resumed from it
    assert opened.args.no_save_rng
    check_architecture(opened, args, flag="--load")
    frozen = FrozenModel(model_config_from_args(args), args=args, checkpoint=opened, flag="--load")
    (model,) = unwrap_model(frozen.chunks)
    tokens = llama.ids()
    with torch.no_grad():
        out: torch.Tensor = model(tokens, torch.arange(tokens.shape[1]).expand_as(tokens), None)
    return out


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """Folder and Megatron's logits of every case."""
    directory = tmp_path_factory.mktemp("convert")
    for name, changes in llama.CASES.items():
        for dtype in (torch.float32, torch.bfloat16):
            kind = str(dtype).removeprefix("torch.")
            llama.save(directory / name / kind / "source", dtype=dtype, **changes)
    (logits,) = run_ranks(convert_all, 1, str(directory))
    return directory, logits


@pytest.mark.parametrize("name", llama.CASES)
def test_logits_are_those_of_transformers(converted, name):
    directory, logits = converted
    source = AutoModelForCausalLM.from_pretrained(directory / name / "float32" / "source").eval()
    with torch.no_grad():
        expected = source(llama.ids()).logits
    found = logits[name]
    assert found.shape[-1] == (768 if "vocab_size" in llama.CASES[name] else 512)
    found = found[..., : expected.shape[-1]]
    assert expected.std() > 0.5  # a model that says nothing would agree with any
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


def test_recipes_train_the_architecture_of_an_import(converted, tmp_path):
    """They had the paper's, untied."""
    start = converted[0] / "qwen2_tied" / "bfloat16" / "megatron"
    settings = {"MODEL_ARGS": f"{start}/ARGS.txt", "FORGET_TOKENS": str(2**20)}
    weights = load_file(start.parent / "source" / "model.safetensors").values()
    count = sum(tensor.numel() for tensor in weights) + (512 - llama.TOKENS) * 32
    world = build(tmp_path)
    # One plan, which takes 5 s of imports, is enough.
    for recipe, python in (("unlearn_lm", sys.executable), ("chat", f"{tmp_path}/echo-words")):
        result = world.run(recipe, "--dry-run", **settings, PYTHON=python, without="TOKENIZER")
        words = result.stdout.splitlines()[0].split()
        for flag, *values in map(str.split, (start / "ARGS.txt").read_text().splitlines()):
            assert flag == "--bf16" or after(words, flag) == values
        assert "--untie-embeddings-and-output-weights" not in words
        assert recipe == "chat" or f"parameters    {count:,} (" in result.stdout, result.stderr
        # 128 forgotten samples of 256 tokens, the model's longest text.
        assert recipe == "chat" or after(words, "--train-iters") == ["32"]


@pytest.mark.parametrize("kind", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", llama.CASES)
def test_a_round_trip_is_exact_to_the_bit(converted, name, kind):
    source, back = (converted[0] / name / kind / folder for folder in ("source", "back"))
    expected = load_file(source / "model.safetensors")
    index = json.loads((back / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert len(files) > 1
    found = {}
    for file in files:
        shard = load_file(back / file)
        assert all(index["weight_map"][key] == file for key in shard)
        assert len(shard) == 1 or sum(t.nbytes for t in shard.values()) <= 50_000
        found |= shard
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        assert tensor.dtype == getattr(torch, kind)
        assert found[key].dtype == tensor.dtype
        assert torch.equal(found[key], tensor), key
    copied = [file.name for file in source.iterdir() if file.suffix != ".safetensors"]
    assert {"tokenizer.json", "chat_template.jinja", "config.json"} <= set(copied)
    assert filecmp.cmpfiles(source, back, copied, shallow=False)[0] == copied


@pytest.mark.parametrize("name", ["MHA", "qwen3", "qwen3_moe"])
def test_stock_megatron_with_transformer_engine_finds_the_extra_states_of_its_layers(
    converted, name
):
    folder = converted[0] / name / "float32" / "megatron" / "iter_0000000"
    keys = dcp.FileSystemReader(folder).read_metadata().state_dict_metadata
    layers = {f"self_attention.{part}" for part in ("linear_qkv", "linear_proj", "core_attention")}
    linear = {"linear_fc1", "linear_fc2"}
    mixture = name == "qwen3_moe"
    layers |= {"pre_mlp_layernorm"} if mixture else {f"mlp.{part}" for part in linear}
    if name != "MHA":
        layers |= {"self_attention.q_layernorm", "self_attention.k_layernorm"}
    expected = {
        f"decoder.layers.{layer}._extra_state/shard_{i}_4" for layer in layers for i in range(4)
    }
    expected.add("decoder.final_layernorm._extra_state/shard_0_1")
    expected |= {
        f"decoder.layers.mlp.experts.experts.{part}._extra_state/shard_{layer}.{expert}_4.4"
        for part in (linear if mixture else ())
        for layer in range(4)
        for expert in range(4)
    }
    assert {key for key in keys if "_extra_state" in key} == expected
