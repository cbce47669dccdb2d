"""Per-sample perplexities of `tools/analyze.py` against a naive fp64 model."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from megatron.core.datasets.indexed_dataset import IndexedDataset
from tokenizers import processors

from tests.helpers import llama, naive_gpt
from tests.helpers.entry import ROOT, Launch
from tests.helpers.tiny import REFERENCE_ITERATION, SEQUENCE, VOCAB

HEADS, GROUPS = 4, 2

END_OF_DOCUMENT = 2
LAYOUTS = {
    "one rank": (1, ()),
    "DP 2": (2, ()),
    "PP 2": (2, ("--pipeline-model-parallel-size", 2)),
    "TP 2": (2, ("--tensor-model-parallel-size", 2)),
}


@pytest.fixture(scope="module")
def expected(tiny):
    """Losses and probabilities of the first documents, one at a time, without padding."""
    weights = naive_gpt.load_weights(str(tiny.base))
    documents = IndexedDataset(str(tiny.forget))
    losses, probabilities = [], []
    with torch.no_grad():
        for index in range(len(documents)):
            tokens = torch.from_numpy(documents[index][:SEQUENCE].astype(np.int64))
            inputs = torch.cat((torch.tensor([END_OF_DOCUMENT]), tokens[:-1]))[None]
            z = naive_gpt.logits(weights, inputs, heads=HEADS, groups=GROUPS)[0, :, :VOCAB]
            log_p = z.log_softmax(-1)[torch.arange(len(tokens)), tokens]
            losses.append(-log_p.mean().item())
            probabilities.append(log_p.exp().mean().item())
    return np.array(losses), np.array(probabilities)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_agrees_with_naive(layout, tiny, server, expected, tmp_path):
    ranks, flags = LAYOUTS[layout]
    output = tmp_path / "perplexity.json"
    earlier = f"{tiny.base}/iter_{REFERENCE_ITERATION:07d}"
    models = [str(tiny.base)] if flags else [str(tiny.base), earlier]
    said = server.tool(
        *("analyze", "perplexity", "--checkpoint", *models, "--data", f"pairs={tiny.forget}"),
        *("--samples", 1_000_000, "--output", output, *flags),
        ranks=ranks,
    )
    assert f"{output}, {output.with_suffix('.png')}" in said.splitlines()
    assert "\r" not in said  # a bar's, where nobody watches
    report = json.loads(output.read_text())
    assert report["settings"]["tokenizer_model"] == str(tiny.tokenizer)  # the checkpoint's
    assert list(report["models"]) == models
    found = report["models"][models[0]]["sets"]["pairs"]
    losses, probabilities = expected
    # fp32 against fp64, a mean over the tokens of a sample.
    np.testing.assert_allclose(found["loss"], losses, rtol=2e-5)
    np.testing.assert_allclose(found["probability"], probabilities, rtol=1e-4)
    weights = np.array(found["tokens"])
    corpus = np.exp((losses * weights).sum() / weights.sum())
    assert found["corpus_perplexity"] == pytest.approx(corpus, rel=1e-4)
    assert output.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    mean = (probabilities * weights).sum() / weights.sum()
    assert f"base {found['corpus_perplexity']:>11.2f} {mean:>7.4f} " in said
    if not flags:
        other = report["models"][models[1]]
        shift = other["sets"]["pairs"]["summary"]["loss"]["shift"]
        difference = np.mean(other["sets"]["pairs"]["loss"]) - losses.mean()
        assert shift["value"] == pytest.approx(difference, rel=1e-3)
        assert f"{output} has 2 of 2 models" in said
        assert f"base@20 {other['sets']['pairs']['corpus_perplexity']:>11.2f}" in said
        assert (other["iteration"], other["run"]["settings"]["train_iters"]) == (20, 40)
        assert [model["label"] for model in report["models"].values()] == ["base", "base@20"]


def test_another_tokenizer_is_refused(tiny, tmp_path):
    other = tmp_path / "other.model"
    other.write_bytes(b"no SentencePiece model")
    command = [sys.executable, "tools/analyze.py", "perplexity", "--checkpoint", str(tiny.base)]
    command += ["--data", f"pairs={tiny.forget}", "--tokenizer-model", str(other)]
    command += ["--output", str(tmp_path / "out.json")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert "other.model" in done.stderr.splitlines()[-1]
    assert not (tmp_path / "out.json").exists()


def test_of_an_imported_model(tiny, server, tmp_path):
    """A user's own model and tokenizer, which begins texts with a token, against `transformers`."""
    model = llama.save(tmp_path / "model")
    tokenizer = llama.tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    tokenizer.save_pretrained(model)
    (tmp_path / "text.jsonl").write_text(
        "".join(
            json.dumps({"text": f"Question {i}: {i} + {i + 3}?\nAnswer."}) + "\n" for i in range(20)
        )
    )
    kind = ["--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", str(model)]
    prefix, output = tmp_path / "text", tmp_path / "perplexity.json"
    start, rounded = str(tmp_path / "start"), str(tmp_path / "rounded")
    server.tool(
        *("preprocess_data", "--input", f"{prefix}.jsonl", "--output-prefix", prefix, *kind)
    )
    take = ("convert_checkpoint", "import", "--source", model, "--output")
    server.tool(*take, start)
    server.tool(*take, rounded, "--dtype", "bfloat16")
    said = server.tool(
        *("analyze", "perplexity", "--checkpoint", start, rounded),
        *("--data", f"own={prefix}_text_document", "--output", output),
    )
    precision = f"{rounded} was trained in bf16 and is computed in fp32, as --checkpoint {start} is"
    assert precision in said
    # Two that cannot be compared with it are refused before it is scored.
    wrong = {str(tmp_path / "nowhere"): "found nothing at", str(tiny.base): "expected at most 64"}
    words = ("--data", f"own={prefix}_text_document", "--output", tmp_path / "none.json")
    launches = [
        Launch(
            ("perplexity", "--checkpoint", start, other, *words), script=ROOT / "tools/analyze.py"
        )
        for other in wrong
    ]
    for (code, said), message in zip(server.results(launches), wrong.values(), strict=True):
        assert code == 2, said
        assert message in said.splitlines()[-1]
        assert "1 of 2 models" not in said
    scored, other = json.loads(output.read_text())["models"].values()
    assert (scored["computed_in"], other["computed_in"]) == ("fp32", "fp32")
    documents = IndexedDataset(f"{prefix}_text_document")
    expected = []
    for document in documents:
        tokens = torch.from_numpy(document.astype(np.int64))
        inputs = torch.cat((torch.tensor([llama.config().eos_token_id]), tokens[:-1]))[None]
        with torch.no_grad():
            z = llama.model()(inputs).logits[0]
        assert tokens[0] == llama.config().bos_token_id  # read, and not scored
        expected.append(torch.nn.functional.cross_entropy(z[1:], tokens[1:]).item())
    assert len(documents) == 20
    assert scored["sets"]["own"]["tokens"] == [len(document) - 1 for document in documents]
    np.testing.assert_allclose(scored["sets"]["own"]["loss"], expected, rtol=2e-5)
