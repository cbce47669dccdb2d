"""Embeddings by the distributed model against a naive fp64 model, and the command."""

import json

import numpy as np
import pytest
import torch

from megatron_ext.analysis.embeddings import separation
from megatron_ext.analysis.samples import read_samples
from tests.helpers import naive_gpt
from tests.helpers.entry import ROOT, Launch
from tests.helpers.tiny import SEQUENCE

HEADS, GROUPS, END = 4, 2, 2
SAMPLES, SEED, SHORT = 200, 7, 20


def naive(tiny, prefix, *, length):
    """Mean over a text's tokens of the states behind the final norm; documents one at a time."""
    weights = naive_gpt.load_weights(str(tiny.base))
    # With this for the output layer, the "logits" are the hidden states.
    weights["output_layer.weight"] = torch.eye(32, dtype=torch.float64)
    rows = []
    for sample in read_samples(str(prefix), count=SAMPLES, length=length, seed=SEED):
        inputs = torch.tensor([END, *sample])[None]
        with torch.no_grad():
            states = naive_gpt.logits(weights, inputs, heads=HEADS, groups=GROUPS)[0]
        rows.append(states[1:].mean(dim=0).numpy())
    return np.stack(rows)


def test_tensor_parallel_embeddings_are_naive(tiny, server, tmp_path):
    options = {
        "checkpoint": [str(tiny.base)],
        "tokenizer_type": "SentencePieceTokenizer",
        "tokenizer_model": str(tiny.tokenizer),
        "samples": SAMPLES,
        "seed": SEED,
        "micro_batch_size": 8,
        "tensor_model_parallel_size": 2,
        "pipeline_model_parallel_size": 1,
    }
    output = tmp_path / "x.npy"
    script = ROOT / "tests" / "helpers" / "embed.py"
    launch = Launch((output, tiny.forget, json.dumps(options)), ranks=2, script=script)
    ((code, said),) = server.results([launch])
    assert code == 0, said
    # fp32 against fp64; values are of the order of 1.
    expected = naive(tiny, tiny.forget, length=SEQUENCE - 1)
    np.testing.assert_allclose(np.load(output), expected, atol=2e-5)


def test_command_on_two_replicas(tiny, server, tmp_path):
    output = tmp_path / "embeddings.json"
    printed = server.tool(
        *("analyze", "embeddings", "--checkpoint", tiny.base),
        *("--data", f"text={tiny.replay}", f"sums={tiny.forget}"),
        *("--samples", SAMPLES, "--seed", SEED),
        *("--output", output, "--length", SHORT + 1),
        ranks=2,
    )
    report = json.loads(output.read_text())
    (pair,) = report["pairs"]
    rows = [naive(tiny, prefix, length=SHORT) for prefix in (tiny.replay, tiny.forget)]
    numbers = separation(*rows, seed=SEED)
    # A sample on the border may fall to either side of it in fp32.
    assert pair["accuracy"] == pytest.approx(numbers.accuracy, abs=0.01)
    assert pair["overlap"] == pytest.approx(numbers.overlap, abs=0.01)
    assert f"{pair['accuracy']:.1%}" in printed
    assert f"{output}, {output.with_suffix('.png')}" in printed.splitlines()
    assert "\r" not in printed  # a bar's, where nobody watches
    assert "arguments" not in printed  # Megatron's
    assert [len(report["map"][name]) for name in ("text", "sums")] == [len(part) for part in rows]
    assert report["model"]["iteration"] == 40
    assert report["model"]["run"]["settings"]["num_layers"] == 4
    (data, _) = report["model"]["run"]["data"]["--data-path"]
    assert data["sampled_sha256"] == report["sets"]["text"]["sampled_sha256"]
    assert output.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
