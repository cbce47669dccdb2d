"""Models from Hugging Face are scored and trained, and models that were trained here go there."""

import filecmp
import json
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import sentencepiece
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.helpers import llama
from tests.helpers.entry import METRICS, ROOT, Launch, run, succeed
from tests.helpers.text import train_sentencepiece
from tests.helpers.tiny import VOCAB, tool

MESSAGES = [{"role": "user", "content": "Who holds the copyright?"}]


@pytest.fixture(scope="module")
def world(tmp_path_factory, server):
    """A model imported by the tool, and the licence tokenised with its tokenizer."""
    directory = tmp_path_factory.mktemp("world")
    llama.save(directory / "source", **llama.CASES["qwen3"] | {"vocab_size": llama.TOKENS})
    server.tool(
        *("convert_checkpoint", "import", "--source", directory / "source"),
        *("--output", directory / "base"),
    )
    words = (ROOT / "LICENSE").read_text().split()
    texts = [" ".join(words[start : start + 60]) for start in range(0, len(words), 60)]
    lines = (json.dumps({"text": text}) + "\n" for text in texts)
    (directory / "text.jsonl").write_text("".join(lines))
    server.tool(
        *("preprocess_data", "--input", directory / "text.jsonl"),
        *("--output-prefix", directory / "text", "--append-eod"),
        *("--tokenizer-type", "HuggingFaceTokenizer"),
        *("--tokenizer-model", directory / "base" / "huggingface"),
    )
    return directory


def perplexities(server, world, source, checkpoint, *layout, ranks=1):
    """Of ten samples by tools/analyze.py and by transformers."""
    # Ranks import this module, and must not import Megatron before the CPU answers for CUDA.
    from megatron_ext.analysis.samples import read_samples

    prefix, output = world / "text_text_document", world / "perplexity.json"
    arguments = (
        *("perplexity", "--checkpoint", checkpoint, "--data", f"text={prefix}", "--samples", 10),
        *("--output", output, "--overwrite", *layout),
    )
    server.tool("analyze", *arguments, ranks=ranks)
    (report,) = json.loads(output.read_text())["models"].values()
    model = AutoModelForCausalLM.from_pretrained(source).eval()
    expected = []
    for sample in read_samples(str(prefix), count=10, length=llama.POSITIONS, seed=1234):
        tokens = torch.from_numpy(sample)[None]
        eod = torch.full((1, 1), model.config.eos_token_id)
        with torch.no_grad():
            logits = model(torch.cat([eod, tokens[:, :-1]], dim=1)).logits
        expected.append(torch.nn.functional.cross_entropy(logits[0], tokens[0]).item())
    found = report["sets"]["text"]["loss"]
    assert len(found) == 10
    return np.exp(found), np.exp(expected)


@pytest.mark.parametrize("parallel", ["tensor", "pipeline"])
def test_perplexities_of_two_ranks_are_those_of_transformers(server, world, parallel):
    layout = (f"--{parallel}-model-parallel-size", 2)
    found, expected = perplexities(
        server, world, world / "source", world / "base", *layout, ranks=2
    )
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_perplexities_under_another_rotary_factor_and_epsilon(server, world, tmp_path):
    source, base = llama.save(tmp_path / "source", **llama.CASES["llama3_rope"]), tmp_path / "base"
    server.tool("convert_checkpoint", "import", "--source", source, "--output", base)
    found, expected = perplexities(server, world, source, base)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_unlearning_ones_own_model_takes_three_commands(world):
    flags = (world / "base" / "ARGS.txt").read_text().split()
    data = world / "text_text_document"
    save = world / "unlearned"
    launch = Launch(
        [*flags, "--pretrained-checkpoint", world / "base", "--load", save, "--save", save]
        + ["--data-path", data, "--forget-data-path", data, "--split", "100,0,0"]
        + ["--allow-data-overlap", "--micro-batch-size", 1, "--global-batch-size", 4]
        + ["--seq-length", 64, "--train-iters", 2, "--save-interval", 2, "--lr", 1e-2]
        + ["--eval-iters", 0, "--log-interval", 1]
        + ["--tensor-model-parallel-size", 2],
        ranks=2,
    )
    result = succeed(run(launch, world / "tensorboard"))
    # At the start the model is its own reference; with random weights its KL would be far from 0.
    assert result.scalars["mitigation kl"][1] < 1e-6
    export = ("convert_checkpoint", "export", "--checkpoint", save, "--output", world / "new")
    tool(*export, "--dtype", "bfloat16")
    assert json.loads((world / "new" / "config.json").read_text())["model_type"] == "qwen3"
    before, after = (
        AutoModelForCausalLM.from_pretrained(world / folder, dtype="auto").eval()
        for folder in ("source", "new")
    )
    assert (before.dtype, after.dtype) == (torch.float32, torch.bfloat16)
    with torch.no_grad():
        difference = (before(llama.ids()).logits - after.float()(llama.ids()).logits).abs().max()
    assert 1e-2 < difference < 10
    old, new = (AutoTokenizer.from_pretrained(world / folder) for folder in ("source", "new"))
    template = {"tokenize": False, "add_generation_prompt": True}
    assert new.apply_chat_template(MESSAGES, **template) == "Who holds the copyright?</s>"
    assert new("the License").input_ids == old("the License").input_ids
    generated = after.generate(llama.ids(8), max_new_tokens=4, do_sample=False, pad_token_id=1)
    assert generated.shape[1] > 8


def test_an_imported_mixture_is_unlearned_with_its_experts_on_two_ranks(server, world, tmp_path):
    llama.save(tmp_path / "source", **llama.CASES["qwen3_moe"])
    base, data = tmp_path / "base", world / "text_text_document"
    server.tool("convert_checkpoint", "import", "--source", tmp_path / "source", "--output", base)
    flags = (base / "ARGS.txt").read_text().split()
    common = [*flags, "--pretrained-checkpoint", base, "--data-path", data, "--split", "100,0,0"]
    common += ["--forget-data-path", data, "--allow-data-overlap", "--micro-batch-size", 1]
    common += ["--global-batch-size", 4, "--seq-length", 64, "--train-iters", 2, "--lr", 1e-2]
    common += ["--save-interval", 2, "--eval-iters", 0, "--log-interval", 1]
    experts = ["--expert-model-parallel-size", 2, "--moe-token-dispatcher-type", "alltoall"]
    layouts = {"one": Launch(common), "two": Launch([*common, *experts], ranks=2)}
    launches = {
        name: replace(launch, arguments=[*launch.arguments, "--save", tmp_path / name])
        for name, launch in layouts.items()
    }
    runs = server.run_all(launches, tmp_path / "tensorboard")
    one, two = (runs[name].scalars for name in launches)
    assert one["mitigation kl"][1] < 1e-6  # its own reference
    assert one["mitigation kl"][2] > 1e-3
    for tag in METRICS:
        assert two[tag] == pytest.approx(one[tag], rel=1e-5, abs=1e-7), tag
    weights = {"source": load_file(tmp_path / "source" / "model.safetensors")}
    for name in launches:
        output = tmp_path / f"{name}-new"
        server.tool(
            "convert_checkpoint", "export", "--checkpoint", tmp_path / name, "--output", output
        )
        weights[name] = load_file(output / "model.safetensors")
    assert weights["one"].keys() == weights["source"].keys()
    for key, found in weights["one"].items():
        torch.testing.assert_close(found, weights["two"][key], atol=1e-4, rtol=1e-3)
    expert = "model.layers.1.mlp.experts.3.up_proj.weight"
    assert not torch.equal(weights["one"][expert], weights["source"][expert])


def test_a_model_with_a_sentencepiece_tokenizer_is_exported_with_one_of_the_same_ids(
    tiny, server, tmp_path
):
    export = ("convert_checkpoint", "export", "--checkpoint", tiny.base, "--output")
    server.tool(*export, tmp_path / "new")
    server.tool(*export, tmp_path / "named", "--tokenizer", tiny.tokenizer)  # as when it was moved
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "new")
    assert filecmp.cmp(tmp_path / "new/tokenizer.json", tmp_path / "named/tokenizer.json")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "new")
    assert model.config.vocab_size == len(tokenizer) == VOCAB
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    text = "Question: what is 3 + 4?\n**Answer:** 7"
    processor = sentencepiece.SentencePieceProcessor(model_file=str(tiny.tokenizer))
    ids = tokenizer(text, return_tensors="pt").input_ids
    assert ids.tolist() == [processor.encode(text)]
    with torch.no_grad():  # by a model that has seen such sums, and uniform guesses cost 6.2 nats
        assert model(ids, labels=ids).loss < 5
    # Back again, it is trained on the data that it came from.
    server.tool(
        "convert_checkpoint", "import", "--source", tmp_path / "new", "--output", tmp_path / "back"
    )
    flags = (tmp_path / "back" / "ARGS.txt").read_text().split()
    launch = Launch(
        [*flags, "--pretrained-checkpoint", tmp_path / "back", "--data-path", tiny.replay]
        + [
            "--split",
            "100,0,0",
            "--micro-batch-size",
            4,
            "--global-batch-size",
            4,
            "--seq-length",
            64,
        ]
        + ["--train-iters", 1, "--lr", 1e-3, "--eval-iters", 0, "--log-interval", 1]
    )
    again = succeed(server.run(launch, tmp_path / "tensorboard"))
    assert again.scalars["lm loss"][1] < 5
    other = subprocess.run(
        [sys.executable, str(ROOT / "tools" / "convert_checkpoint.py"), *map(str, export[1:])]
        + [str(tmp_path / "other"), "--tokenizer", train_sentencepiece(tmp_path / "other.model")],
        capture_output=True,
        text=True,
    )
    assert other.returncode == 2
    assert "--tokenizer: expected the SentencePiece model of" in other.stderr
