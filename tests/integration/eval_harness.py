"""lm-evaluation-harness over a tiny model, offline. Not part of `make test`:

pip install -r requirements-eval.txt; pytest tests/integration/eval_harness.py
"""

import json
from argparse import ArgumentParser

import pytest
import torch
from lm_eval.api.instance import Instance
from tokenizers import processors
from transformers import AutoModelForCausalLM

from megatron_ext.checkpoint.own_tokenizer import tokenizer_spec
from megatron_ext.evaluation import harness, paper
from megatron_ext.evaluation.completion import Codec
from megatron_ext.evaluation.harness_model import HarnessModel
from megatron_ext.exceptions import ConfigError, DataError
from tests.helpers import llama
from tests.helpers.entry import ROOT, Launch

OWN = ("demo_instructions", "demo_sums", "demo_definitions", "demo_definitions_seen")


def write(path, records):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))


def choices(count):
    return [
        {"question": f"Which is {i}?", "A": "one", "B": "two", "C": "three", "D": "four"}
        for i in range(count)
    ]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A model, and small data of the forms that the sets have on the hub."""
    from lm_eval.tasks import TaskManager

    directory = tmp_path_factory.mktemp("harness")
    llama.save(directory / "model")
    data = directory / "data"
    manager = TaskManager()
    for group, hub, split in (
        ("mmlu", "cais/mmlu", "test"),
        ("cmmlu", "haonan-li/cmmlu", "test"),
        ("ceval-valid", "ceval/ceval-exam", "val"),
    ):
        for subject in subjects(manager, group):
            if group == "mmlu":
                rows = [
                    {"question": r["question"], "choices": ["1", "2", "3", "4"], "answer": i % 4}
                    for i, r in enumerate(choices(3))
                ]
            elif group == "cmmlu":
                rows = [
                    {"Question": r.pop("question"), **r, "Answer": "ABCD"[i]}
                    for i, r in enumerate(choices(3))
                ]
            else:
                rows = [r | {"answer": "ABCD"[i]} for i, r in enumerate(choices(3))]
            for name in (split, "dev"):
                write(data / hub / subject / f"{name}.jsonl", rows)
    sums = [{"question": f"{n} + {n}?", "answer": f"It is\n#### {2 * n}"} for n in range(6)]
    for name in ("train", "test"):
        write(data / "openai/gsm8k/main" / f"{name}.jsonl", sums)
    problem = {
        "task_id": "t/0",
        "prompt": 'def one():\n    """1"""\n',
        "test": "def check(f):\n    assert f() == 1\n",
        "entry_point": "one",
        "canonical_solution": "    return 1\n",
    }
    write(data / "openai/openai_humaneval" / "test.jsonl", [problem])
    tests = ["assert one() == 1", "assert one() > 0", "assert one() < 2"]
    write(
        data / "google-research-datasets/mbpp/full" / "test.jsonl",
        [{"task_id": 1, "text": "one", "code": "def one(): return 1", "test_list": tests}],
    )
    write(
        data / "google/IFEval" / "train.jsonl",
        [
            {
                "key": 1,
                "prompt": "Say it without commas.",
                "instruction_id_list": ["punctuation:no_comma"],
                "kwargs": [{}],
            }
        ],
    )
    items = [{"rule": "lower", "argument": ""}, {"rule": "at_most_words", "argument": "99"}]
    write(data / "demo/instructions/test.jsonl", [{"prompt": "Say something.", "rules": items}] * 3)
    choice = {"question": "Which?\nAnswer:", "choices": ["first", "second", "third"], "answer": 1}
    for name in ("sums", "definitions", "definitions_seen"):
        write(data / f"demo/{name}/test.jsonl", [choice | {"answer": i} for i in range(3)])
    return directory


def subjects(manager, group):
    """Names of the parts of a group's data set; some more do no harm."""
    prefix = f"{group}_"
    return [name.removeprefix(prefix) for name in manager.all_tasks if name.startswith(prefix)]


def run(world, output, *arguments):
    parser = ArgumentParser()
    harness.add_arguments(parser)
    common = ("--model", world / "model", "--backend", "huggingface", "--name", "mine")
    common += ("--data-dir", world / "data", "--output", output, "--micro-batch-size", 4)
    options = parser.parse_args([*map(str, (*common, *arguments))])
    options.is_writer = True
    harness.run(options)
    return json.loads(output.read_text())


def test_all_benchmarks_by_name(world, tmp_path, capsys):
    tasks = ("mmlu", "cmmlu", "ceval-valid", "gsm8k", "humaneval", "mbpp", "ifeval")
    results = run(
        world, tmp_path / "scores.json", "--allow-code-execution", "--limit", 2, "--tasks", *tasks
    )
    for task, metric in paper.BENCHMARKS.values():
        assert 0 <= results["results"][task][metric] <= 1, task
    assert "prompt_level_strict_acc,none" in results["results"]["ifeval"]
    assert results["n-samples"]["gsm8k"]["effective"] == 2
    shown = capsys.readouterr().out
    assert "| mine " in shown
    assert "| UnlearnLM      | paper    |" in shown


def test_own_tasks_are_scored_as_transformers_scores_them(world, tmp_path):
    results = run(world, tmp_path / "scores.json", "--log-samples", "--tasks", *OWN)
    scores = results["results"]
    assert scores["demo_sums"]["acc,none"] == pytest.approx(1 / 3)  # the same answer to all three
    answers = [sample["resps"][0][0] for sample in results["samples"]["demo_instructions"]]
    expected = float(bool(answers[0].strip()) and answers[0].islower())
    assert scores["demo_instructions"]["case,none"] == expected
    assert scores["demo_instructions"]["length,none"] == float(bool(answers[0].strip()))
    tokenizer = llama.tokenizer()
    model = AutoModelForCausalLM.from_pretrained(world / "model").eval()
    sample = results["samples"]["demo_sums"][0]
    for choice, found in zip(["first", "second", "third"], sample["filtered_resps"], strict=True):
        context = tokenizer("Which?\nAnswer:").input_ids
        ids = tokenizer(f"Which?\nAnswer: {choice}").input_ids
        with torch.no_grad():
            log_p = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        wanted = sum(log_p[i - 1, ids[i]].item() for i in range(len(context), len(ids)))
        assert float(found[0]) == pytest.approx(wanted, abs=1e-4)


class Recorder:
    """A model that keeps what it is asked to score."""

    is_writer, batch_size, context_length, identity = True, 4, 8, "recorder"

    def score(self, sequences):
        self.asked = [(list(s.tokens), s.start) for s in sequences]
        return [(-float(len(s.tokens) - s.start), True) for s in sequences]


@pytest.mark.parametrize("begins", [False, True])
def test_windows_are_those_of_the_harness(tmp_path, begins):
    """As its own model makes them, but that a token which begins the document is not scored as text."""
    fast = llama.tokenizer()
    if begins:
        fast.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 0)]
        )
    fast.save_pretrained(tmp_path)
    text = "the License and the Work of the License"
    ids = llama.tokenizer()(text).input_ids
    assert 8 < len(ids) < 16
    first = 0 if begins else 1
    model = HarnessModel(Recorder(), Codec(tokenizer_spec(tmp_path)))
    request = Instance("loglikelihood_rolling", {}, (text,), 0)
    assert model.loglikelihood_rolling([request], disable_tqdm=True) == [-len(ids)]
    windows = [([first, *ids[:8]], 1), (ids[-9:], 17 - len(ids))]
    assert sorted(model._generator.asked) == sorted(windows)
    model.loglikelihood([Instance("loglikelihood", {}, ("", text), 0)], disable_tqdm=True)
    assert model._generator.asked == [(ids[-9:], 1)]  # of a text that is too long the end
    model.loglikelihood([Instance("loglikelihood", {}, ("", "the"), 0)], disable_tqdm=True)
    assert model._generator.asked[0][0][0] == first


def test_an_answer_without_a_token_is_refused(tmp_path):
    llama.tokenizer().save_pretrained(tmp_path)
    model = HarnessModel(Recorder(), Codec(tokenizer_spec(tmp_path)))
    pair = Instance("loglikelihood", {}, ("the Licen", "se"), 0)
    assert len(llama.tokenizer()("the License").input_ids) <= len(
        llama.tokenizer()("the Licen").input_ids
    )
    with pytest.raises(DataError, match="found none for 'se' behind 'the Licen'"):
        model.loglikelihood([pair], disable_tqdm=True)


def test_a_chat_model_is_asked_as_a_user(world, tmp_path):
    arguments = ("--apply-chat-template", "--log-samples", "--tasks", "demo_instructions")
    results = run(world, tmp_path / "chat.json", *arguments)
    answer = results["samples"]["demo_instructions"][0]["resps"][0][0]
    tokenizer = llama.tokenizer()
    model = AutoModelForCausalLM.from_pretrained(world / "model").eval()
    ids = tokenizer("Say something.</s>", return_tensors="pt").input_ids
    output = model.generate(ids, max_new_tokens=64, do_sample=False, pad_token_id=1)
    assert answer == tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)


def test_an_answer_that_a_task_begins_is_gone_on_with(world, tmp_path):
    """As humaneval_instruct begins it: behind a finished turn the model would have nothing to say."""
    own = tmp_path / "tasks"
    own.mkdir()
    (own / "begun.yaml").write_text(
        "task: begun\ndataset_path: demo/instructions\ntest_split: test\noutput_type: generate_until\n"
        'doc_to_text: "{{prompt}}"\ndoc_to_target: ""\ngen_prefix: "the License"\n'
        "generation_kwargs:\n  until: []\n  max_gen_toks: 8\nmetric_list:\n  - metric: exact_match\n"
    )
    more = ("--apply-chat-template", "--log-samples", "--include-path", own, "--tasks", "begun")
    results = run(world, tmp_path / "chat.json", *more)
    answer = results["samples"]["begun"][0]["resps"][0][0]
    tokenizer = llama.tokenizer()
    turns = [
        {"role": "user", "content": "Say something."},
        {"role": "assistant", "content": "the License"},
    ]
    text = tokenizer.apply_chat_template(turns, tokenize=False, continue_final_message=True)
    assert text == "Say something.</s>the License"
    model = AutoModelForCausalLM.from_pretrained(world / "model").eval()
    ids = tokenizer(text, return_tensors="pt").input_ids
    output = model.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=1)
    assert answer == tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)
    asked = HarnessModel(Recorder(), Codec(tokenizer_spec(world / "model")))
    assert asked.tok_encode(asked.apply_chat_template(turns, False)) == ids[0].tolist()
    # Without an answer to go on with there is nothing to continue.
    finished = asked.apply_chat_template(turns[:1], False)
    assert asked.tok_encode(finished) == tokenizer("Say something.</s>").input_ids


def test_a_megatron_checkpoint_gives_the_same_at_two_layouts(world, server, tmp_path):
    source = ("import", "--source", world / "model", "--output", tmp_path / "megatron")
    tools = ROOT / "tools"
    arguments = ["harness", "--model", tmp_path / "megatron", "--data-dir", world / "data"]
    arguments += ["--name", "mine", "--apply-chat-template", "--log-samples", "--tasks", *OWN]
    launches = [Launch(source, script=tools / "convert_checkpoint.py")]
    for name, layout in (("tp", "tensor"), ("pp", "pipeline")):
        more = (f"--{layout}-model-parallel-size", 2, "--output", tmp_path / name)
        launches.append(Launch((*arguments, *more), ranks=2, script=tools / "evaluate.py"))
    for launch in launches:
        ((code, output),) = server.results([launch])
        assert code == 0, output[-4000:]
    wanted = run(world, tmp_path / "hf", "--apply-chat-template", "--log-samples", "--tasks", *OWN)
    for name in ("tp", "pp"):
        found = json.loads((tmp_path / name).read_text())
        assert found["results"] == wanted["results"]
        for task in OWN:
            pairs = zip(found["samples"][task], wanted["samples"][task], strict=True)
            for ours, theirs in pairs:
                if task == "demo_instructions":
                    assert ours["resps"] == theirs["resps"]
                else:
                    values = [float(value) for value, _greedy in ours["filtered_resps"]]
                    expected = [float(value) for value, _greedy in theirs["filtered_resps"]]
                    assert values == pytest.approx(expected, abs=1e-4)


def test_what_is_missing_is_named(world, tmp_path):
    with pytest.raises(ConfigError, match="mmlo"):
        run(world, tmp_path / "x.json", "--tasks", "mmlo")
    with pytest.raises(DataError, match="expected the data set"):
        run(world, tmp_path / "x.json", "--tasks", "hellaswag")
