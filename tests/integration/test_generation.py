"""Generation: the key-value cache, parallel layouts and `transformers` all give the same tokens."""

import json
import shutil

import pytest
import torch
from sentencepiece import SentencePieceProcessor
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_ext.evaluation.backends import open_generator
from tests.helpers import generate_all, llama, naive_gpt
from tests.helpers.entry import ROOT, Launch
from tests.helpers.generate_all import NEW, PROMPTS
from tests.helpers.tiny import REFERENCE_ITERATION, VOCAB

# Tensor and pipeline parallelism, and ranks; what is left of the ranks is data parallelism.
LAYOUTS = {"one rank": (1, 1, 1), "TP 2": (2, 1, 2), "PP 2": (1, 2, 2), "DP 2": (1, 1, 2)}


def tool(name, *arguments):
    return Launch(arguments, script=ROOT / "tools" / f"{name}.py")


@pytest.fixture(scope="module")
def world(tmp_path_factory, server):
    """A Hugging Face model, and the Megatron checkpoint made of it."""
    directory = tmp_path_factory.mktemp("generation")
    llama.save(directory / "hf")
    source = ("import", "--source", directory / "hf", "--output", directory / "megatron")
    ((code, output),) = server.results([tool("convert_checkpoint", *source)])
    assert code == 0, output
    return directory


@pytest.fixture(scope="module")
def model(world):
    return AutoModelForCausalLM.from_pretrained(world / "hf").eval()


@pytest.fixture(scope="module")
def tokenizer(world):
    return AutoTokenizer.from_pretrained(world / "hf")


@pytest.fixture(scope="module")
def expected(model, tokenizer):
    """Greedy tokens of `transformers`, one prompt at a time, without padding and without our code."""
    found = []
    for prompt in PROMPTS:
        ids = torch.tensor([tokenizer(prompt).input_ids])
        output = model.generate(ids, max_new_tokens=NEW, do_sample=False, pad_token_id=1)
        found.append(output[0, ids.shape[1] :].tolist())
    assert len({tuple(tokens) for tokens in found}) == len(PROMPTS)
    return found


@pytest.fixture(scope="module")
def found(world, server):
    """What each rank of each layout found."""
    script = ROOT / "tests" / "helpers" / "generate_all.py"
    launches = [
        Launch((world / "megatron", tensor, pipeline, world / name), ranks=ranks, script=script)
        for name, (tensor, pipeline, ranks) in LAYOUTS.items()
    ]
    for code, output in server.results(launches):
        assert code == 0, output[-4000:]
    return {
        name: [json.loads((world / f"{name}.{rank}").read_text()) for rank in range(ranks)]
        for name, (_, _, ranks) in LAYOUTS.items()
    }


def test_the_cache_and_both_backends(world, found, model, tokenizer, expected):
    (single,) = found["one rank"]
    with open_generator(generate_all.options(world / "hf", "huggingface")) as opened:
        huggingface = generate_all.complete(*opened)
    assert single["greedy"] == single["recomputed"] == expected
    assert huggingface["greedy"] == expected
    assert single["texts"] == huggingface["texts"]
    assert single["sampled"] == huggingface["sampled"]
    assert len({str(single[name]) for name in ("greedy", "sampled", "other seed")}) == 3
    for scores in (single["scores"], huggingface["scores"]):
        for prompt, new, (total, greedy) in zip(PROMPTS, expected, scores[:-1], strict=True):
            ids = tokenizer(prompt).input_ids
            with torch.no_grad():
                log_p = model(torch.tensor([[*ids, *new]])).logits[0].double().log_softmax(-1)
            wanted = log_p[len(ids) - 1 : -1].gather(1, torch.tensor(new)[:, None]).sum()
            assert total == pytest.approx(wanted.item(), abs=1e-4)
            assert greedy
        assert not scores[-1][1]


def test_settings_stored_with_a_model_change_nothing(world, expected, tmp_path):
    """Both backends choose by the command line alone."""
    shutil.copytree(world / "hf", tmp_path / "hf")
    stored = {"repetition_penalty": 1.8, "no_repeat_ngram_size": 2, "do_sample": True, "top_k": 1}
    (tmp_path / "hf" / "generation_config.json").write_text(json.dumps(stored))
    sampling = generate_all.SETTINGS["greedy"]
    with open_generator(generate_all.options(tmp_path / "hf", "huggingface")) as (model, codec):
        requests = [codec.prompt(f"{i}", text, sampling) for i, text in enumerate(PROMPTS[:2])]
        assert model.complete(requests) == expected[:2]


@pytest.mark.parametrize("layout", ["TP 2", "PP 2", "DP 2"])
def test_every_layout_gives_the_same_tokens(found, layout):
    (single,) = found["one rank"]
    assert len(found[layout]) == 2
    for rank in found[layout]:
        for name in rank.keys() - {"scores", "passes"}:
            assert rank[name] == single[name], name
        # Six sequences, two at a time; of two replicas each scores its own.
        assert rank["passes"] == [2 if layout == "DP 2" else 3]
        # Up to the order of fp32 sums.
        for (total, greedy), (wanted, greedy_wanted) in zip(
            rank["scores"], single["scores"], strict=True
        ):
            assert total == pytest.approx(wanted, abs=1e-4)
            assert greedy == greedy_wanted


def test_the_tool_continues_prompts_and_answers_messages(
    world, server, model, tokenizer, expected, tmp_path
):
    prompts, output = tmp_path / "prompts.jsonl", tmp_path / "completions.jsonl"
    records = [{"prompt": text, "id": i} for i, text in enumerate(PROMPTS)]
    records.append({"messages": [{"role": "user", "content": "Who holds the copyright?"}]})
    prompts.write_text("".join(json.dumps(record) + "\n" for record in records))
    command = tool(
        *("generate", "--model", world / "megatron", "--input", prompts, "--output", output),
        *("--max-new-tokens", NEW, "--micro-batch-size", 4),
    )
    ((code, log),) = server.results([command])
    assert code == 0, log
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    for record, line, tokens in zip(records, lines, expected, strict=False):
        text = tokenizer.decode(tokens, skip_special_tokens=True)
        finish = "stop" if tokens[-1] == tokenizer.eos_token_id else "length"
        assert line == record | {"completion": text, "finish": finish, "tokens": len(tokens)}
    assert {line["finish"] for line in lines} == {"stop", "length"}
    # A conversation goes through the stored template, whose end of turn is the end of the text.
    ids = tokenizer("Who holds the copyright?</s>", return_tensors="pt").input_ids
    answer = model.generate(ids, max_new_tokens=NEW, do_sample=False, pad_token_id=1)
    text = tokenizer.decode(answer[0, ids.shape[1] :], skip_special_tokens=True)
    assert lines[-1]["completion"] == text
    assert not list(tmp_path.glob("*.progress"))
    ((code, log),) = server.results([command])
    assert code == 2
    assert "--overwrite" in log.splitlines()[-1]
    assert "Traceback" not in log


def test_a_chat_with_a_sentencepiece_model_against_a_naive_one(tiny, server, tmp_path):
    """Tokenizer and architecture come from the iteration that is named; the template is the built-in one."""
    question, output = "5 + 5", tmp_path / "answers.jsonl"
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(json.dumps({"messages": [{"role": "user", "content": question}]}))
    earlier = tiny.base / f"iter_{REFERENCE_ITERATION:07d}"
    arguments = ("--model", earlier, "--input", prompts, "--output", output)
    ((code, log),) = server.results([tool("generate", *arguments, "--max-new-tokens", NEW)])
    assert code == 0, log
    processor = SentencePieceProcessor(model_file=str(tiny.tokenizer))
    end = processor.eos_id()
    tokens = [*processor.encode(f"User: {question}"), end, *processor.encode("Assistant:")]
    start, weights = len(tokens), naive_gpt.load_weights(str(tiny.reference))
    while len(tokens) < start + NEW and tokens[-1] != end:
        inputs = torch.tensor([tokens])
        logits = naive_gpt.logits(weights, inputs, heads=4, groups=2)[0, -1, :VOCAB]
        tokens.append(int(logits.argmax()))
    answer = json.loads(output.read_text())
    assert answer["tokens"] == len(tokens) - start
    assert answer["completion"] == processor.decode([t for t in tokens[start:] if t != end])
