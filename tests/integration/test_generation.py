"""Generation: the key-value cache, parallel layouts and `transformers` all give the same tokens."""

import json
import os
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_ext.evaluation.sampling import Sampling, Scored
from tests.helpers import llama
from tests.helpers.distributed import run_ranks
from tests.helpers.entry import ROOT
from tests.helpers.tiny import tool

NEW = 12
OPEN: list = []
# Of very different lengths; in batches of two, so that one is padded out and rows wait for each other.
PROMPTS = ["the License", "You may", "copyright notice for the work " * 6, "a", "Grant of patents"]
LAYOUTS = [(2, 1), (1, 2), (1, 1)]  # of two ranks: TP 2, PP 2, DP 2


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A Hugging Face model, and the Megatron checkpoint made of it."""
    directory = tmp_path_factory.mktemp("generation")
    llama.save(directory / "hf")
    tool(
        *("convert_checkpoint", "import", "--source", directory / "hf"),
        *("--output", directory / "megatron"),
    )
    return directory


@pytest.fixture(scope="module")
def expected(world):
    """Greedy tokens of `transformers`, one prompt at a time, without padding and without our code."""
    tokenizer = AutoTokenizer.from_pretrained(world / "hf")
    model = AutoModelForCausalLM.from_pretrained(world / "hf").eval()
    found = []
    for prompt in PROMPTS:
        ids = torch.tensor([tokenizer(prompt).input_ids])
        output = model.generate(ids, max_new_tokens=NEW, do_sample=False, pad_token_id=1)
        found.append(output[0, ids.shape[1] :].tolist())
    assert len({tuple(tokens) for tokens in found}) == len(PROMPTS)
    return found


def options(model: Path, backend: str, tensor: int, pipeline: int) -> Namespace:
    return Namespace(
        model=model,
        backend=backend,
        tokenizer_type=None,
        tokenizer_model=None,
        chat_template=None,
        micro_batch_size=2,
        tensor_model_parallel_size=tensor,
        pipeline_model_parallel_size=pipeline,
    )


def generate(directory: str, backend: str, layouts: list[tuple[int, int]]) -> list[dict[str, list]]:
    """On a rank: for each layout the tokens of all prompts."""
    from megatron_ext.runtime import cpu

    cpu.enable()
    from megatron.core import num_microbatches_calculator, parallel_state, rerun_state_machine
    from megatron.training import global_vars

    from megatron_ext.evaluation.backends import open_generator

    if dist.is_initialized():  # what torchrun would set
        os.environ |= {"RANK": str(dist.get_rank()), "WORLD_SIZE": str(dist.get_world_size())}
        os.environ["LOCAL_RANK"] = os.environ["RANK"]
    found = []
    for tensor, pipeline in layouts:
        parallel_state.destroy_model_parallel()
        num_microbatches_calculator.unset_num_microbatches_calculator()
        rerun_state_machine.destroy_rerun_state_machine()
        global_vars.unset_global_variables()
        opened = open_generator(options(Path(directory), backend, tensor, pipeline))
        OPEN.append(opened)  # never closed: that would end the process group of `run_ranks`
        found.append(complete(*opened.__enter__()))
    return found


def complete(generator: Any, codec: Any) -> dict[str, list]:
    """Tokens of all prompts, with and without the cache, greedy and sampled."""
    found = {}
    for name, cached, sampling in (
        ("greedy", True, Sampling(max_new_tokens=NEW)),
        ("recomputed", False, Sampling(max_new_tokens=NEW)),
        ("sampled", True, Sampling(max_new_tokens=NEW, temperature=0.9, top_p=0.8)),
        ("other seed", True, Sampling(max_new_tokens=NEW, temperature=0.9, seed=1)),
    ):
        generator._use_cache = cached
        requests = [codec.prompt(f"{i}", text, sampling) for i, text in enumerate(PROMPTS)]
        size = generator.batch_size
        batches = [requests[i : i + size] for i in range(0, len(requests), size)]
        found[name] = [tokens for batch in batches for tokens in generator.complete(batch)]
    found["texts"] = [codec.completion(requests[0], found["greedy"][0]).text]
    pairs = zip(requests, found["greedy"], strict=True)
    scored = [Scored(tokens=[*r.tokens, *new], start=len(r.tokens)) for r, new in pairs]
    scored.append(Scored(tokens=[5, 6, 7], start=1))
    batches = [scored[i : i + size] for i in range(0, len(scored), size)]
    found["scores"] = [score for batch in batches for score in generator.score(batch)]
    return found


def same(found: dict[str, list], expected: dict[str, list]) -> bool:
    """The same tokens, and the same log-probabilities up to the order of fp32 sums."""
    for (sum_found, greedy_found), (sum_expected, greedy) in zip(
        found.pop("scores"), scores := expected["scores"], strict=True
    ):
        assert sum_found == pytest.approx(sum_expected, abs=1e-4)
        assert greedy_found == greedy
    return found == {name: value for name, value in expected.items() if value is not scores}


@pytest.fixture(scope="module")
def single(world):
    """By one rank of Megatron."""
    ((found,),) = run_ranks(generate, 1, str(world / "megatron"), "megatron", [(1, 1)])
    return found


def test_one_rank_and_both_backends(world, single, expected):
    (huggingface,) = generate(str(world / "hf"), "huggingface", [(1, 1)])
    assert single["greedy"] == single["recomputed"] == expected
    assert huggingface["greedy"] == expected
    assert single["texts"] == huggingface["texts"]
    assert single["sampled"] == huggingface["sampled"]
    model = AutoModelForCausalLM.from_pretrained(world / "hf").eval()
    tokenizer = AutoTokenizer.from_pretrained(world / "hf")
    prompts = [tokenizer(prompt).input_ids for prompt in PROMPTS]
    for found in (single, huggingface):
        for ids, new, (total, greedy) in zip(prompts, expected, found["scores"][:-1], strict=True):
            with torch.no_grad():
                log_p = model(torch.tensor([[*ids, *new]])).logits[0].double().log_softmax(-1)
            wanted = log_p[len(ids) - 1 : -1].gather(1, torch.tensor(new)[:, None]).sum()
            assert total == pytest.approx(wanted.item(), abs=1e-4)
            assert greedy
        assert not found["scores"][-1][1]
    assert len({str(single[name]) for name in ("greedy", "sampled", "other seed")}) == 3


def test_every_layout_gives_the_same_tokens(world, single):
    for rank in run_ranks(generate, 2, str(world / "megatron"), "megatron", LAYOUTS):
        for found in rank:
            assert same(found, single)


def test_the_tool_continues_prompts_and_answers_messages(world, expected, tmp_path):
    prompts, output = tmp_path / "prompts.jsonl", tmp_path / "completions.jsonl"
    records = [{"prompt": text, "id": i} for i, text in enumerate(PROMPTS)]
    records.append({"messages": [{"role": "user", "content": "Who holds the copyright?"}]})
    prompts.write_text("".join(json.dumps(record) + "\n" for record in records))
    command = ("generate", "--model", world / "megatron", "--input", prompts)
    command += ("--output", output, "--max-new-tokens", NEW, "--micro-batch-size", 4)
    tool(*command)
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    tokenizer = AutoTokenizer.from_pretrained(world / "hf")
    for record, line, tokens in zip(records, lines, expected, strict=False):
        text = tokenizer.decode(tokens, skip_special_tokens=True)
        finish = "stop" if tokens[-1] == tokenizer.eos_token_id else "length"
        assert line == record | {"completion": text, "finish": finish, "tokens": len(tokens)}
    assert {line["finish"] for line in lines} == {"stop", "length"}
    # A conversation goes through the stored template, whose end of turn is the end of the text.
    model = AutoModelForCausalLM.from_pretrained(world / "hf").eval()
    ids = tokenizer("Who holds the copyright?</s>", return_tensors="pt").input_ids
    answer = model.generate(ids, max_new_tokens=NEW, do_sample=False, pad_token_id=1)
    assert lines[-1]["completion"] == tokenizer.decode(
        answer[0, ids.shape[1] :], skip_special_tokens=True
    )
    assert not list(tmp_path.glob("*.progress"))
    refused = subprocess.run(
        [sys.executable, "tools/generate.py", *map(str, command[1:])],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert refused.returncode == 2
    assert "--overwrite" in refused.stderr
    assert "Traceback" not in refused.stderr
