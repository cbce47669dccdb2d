"""FollowBench and MT-Bench end to end: a tiny model answers, a judge on this machine rates."""

import json
import re
from argparse import ArgumentParser

import pytest

from megatron_ext.evaluation import followbench_run, mtbench_run
from megatron_ext.exceptions import ConfigError, DataError
from tests.helpers import llama
from tests.helpers.entry import ROOT, Launch
from tests.helpers.judge import stub_judge

# A checkout of the same form as the project's: modules that import each other by bare names.
UTILS = "def level_of(path):\n    return len(path) - 1\n"
PROMPTS = """
from utils import level_of
from rule_based_evaluation import check_match

def content_evaluation_prompt(evolve_instructions, answer):
    return f"content {level_of(evolve_instructions)}|{evolve_instructions[-1]}|{answer}"

def format_evaluation_prompt(evolve_instructions, answer):
    return f"format {level_of(evolve_instructions)}|{evolve_instructions[-1]}|{answer}"
"""
RULES = """
from utils import level_of

def check_match(target, generation):
    return generation == target

def rule_evaluation_E2E(generation, target, level):
    return level <= int(target)

def rule_evaluation_format(generation, example_id, level):
    return level != 2
"""


def group(kind: str, example: int, source: str = "self", target: str = "", first: int = 0) -> list:
    return [
        {"example_id": example, "category": kind, "source": source, "level": level}
        | {"instruction": f"{kind} {example} level {level}", "target": target}
        for level in range(first, 6)
    ]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A model, a checkout of FollowBench, and the files of MT-Bench."""
    directory = tmp_path_factory.mktemp("evaluation")
    llama.save(directory / "model")
    code, data = directory / "bench" / "code", directory / "bench" / "data"
    code.mkdir(parents=True)
    data.mkdir()
    sources = {"utils": UTILS, "gpt4_based_evaluation": PROMPTS, "rule_based_evaluation": RULES}
    for name, text in sources.items():
        (code / f"{name}.py").write_text(text)
    sets = {
        "content": [*group("content", 1), *group("content", 2, "E2E", "3")],
        "format": [*group("format", 1), *group("format", 22)],
        "example": group("example", 1, target="{instruction}\nnever", first=1),
    }
    for kind, records in sets.items():
        (data / f"{kind}_constraints.json").write_text(json.dumps(records))
    questions = [
        {"question_id": 81, "category": "writing", "turns": ["Write.", "Again, {question}!"]},
        {"question_id": 111, "category": "math", "turns": ["What is 2 + 2?", "And 3?"]},
    ]
    references = [
        {"question_id": 111, "choices": [{"index": 0, "turns": ["It is 4.", "It is 7."]}]}
    ]
    ask = "{question}/{answer}"
    twice = "{question_1}/{answer_1}/{question_2}/{answer_2}"
    prompts = [
        {"name": "single-v1", "prompt_template": ask},
        {"name": "single-math-v1", "prompt_template": "{ref_answer_1}/" + ask},
        {"name": "single-v1-multi-turn", "prompt_template": twice},
        {"name": "single-math-v1-multi-turn", "prompt_template": "{ref_answer_2}/" + twice},
    ]
    prompts = [prompt | {"type": "single", "system_prompt": "Judge."} for prompt in prompts]
    files = {"question": questions, "reference": references, "judge_prompts": prompts}
    for name, records in files.items():
        lines = (json.dumps(record) + "\n" for record in records)
        (directory / f"{name}.jsonl").write_text("".join(lines))
    return directory


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")


def run(verb, *arguments):
    parser = ArgumentParser()
    verb.add_arguments(parser)
    options = parser.parse_args([*map(str, arguments)])
    options.is_writer = True
    verb.run(options)


def answering(world, output):
    return (
        *("--model", world / "model", "--backend", "huggingface", "--name", "mine"),
        *("--output-dir", output, "--max-new-tokens", 5),
    )


def judging(stub):
    return ("--judge-url", stub.url, "--judge-model", "stub", "--judge-parallel", 2)


def follow_verdict(messages):
    """Content: level 2 of example 1 is not understood; format: the last constraint always fails."""
    kind, level, example = re.match(r"(\w+) (\d)\|\w+ (\d+) ", messages[0]["content"]).groups()
    assert example == "1", "a rule checks the others"
    words = ["YES"] * int(level)
    if kind == "format":
        words[-1] = "NO"
    return "Hm." if (kind, level) == ("content", "2") else f"Because.\n{words}"


def test_followbench(world, tmp_path, capsys):
    common = ("--followbench", world / "bench", "--constraint-types")
    common += ("content", "format", "example")
    with stub_judge(follow_verdict) as stub:
        run(followbench_run, *common, *answering(world, tmp_path), *judging(stub))
        assert len(stub.requests) == 10  # the rest is for rules
        results = json.loads((tmp_path / "followbench-mine.json").read_text())
        # Answers and verdicts are there: asked again is for the one that was not understood.
        run(followbench_run, *common, "--name", "mine", "--output-dir", tmp_path, *judging(stub))
        assert len(stub.requests) == 10 + 1
    assert json.loads((tmp_path / "followbench-mine.json").read_text()) == results
    with stub_judge(lambda messages: "NO") as other:
        # Another one rates a type, and then both: no verdict of the first is taken for its own.
        name = ("--name", "mine", "--output-dir", tmp_path, "--judge-url", other.url)
        for kinds in (["content"], ["content", "format"]):
            types = ("--constraint-types", *kinds)
            run(followbench_run, *common[:2], *types, *name, "--judge-model", "other")
        assert len(other.requests) == 10 + 4
    scores = json.loads((tmp_path / "followbench-mine.json").read_text())
    assert scores["constraint_types"]["format"]["unparsable"] == 4

    lines = (tmp_path / "api_output" / "mine" / "content_constraint.jsonl").read_text().splitlines()
    answers = [json.loads(line) for line in lines]
    assert [line["prompt_new"] for line in answers] == [
        f"content {example} level {level}" for example in (1, 2) for level in range(1, 6)
    ]
    assert all(
        line["prompt"] == line["prompt_new"] for line in answers
    )  # of its old and new versions
    texts = [line["choices"][0]["message"]["content"] for line in answers]
    assert any(texts)
    verdicts = tmp_path / "gpt4_discriminative_eval_output" / "mine" / "content_constraint.jsonl"
    first = json.loads(verdicts.read_text().splitlines()[0])
    assert first["prompt_new"] == f"content 1|content 1 level 1|{texts[0]}"

    content, formats, example = results["constraint_types"].values()
    # The judge: all satisfied but for level 2, unknown; the rule: levels 1 to 3.
    assert content["hsr"]["levels"] == content["ssr"]["levels"] == [100, 100, 100, 50, 50]
    assert content["hsr"]["bounds"] == pytest.approx([70, 80])
    assert content["csl"] == 3  # the first example holds one of them, or all
    assert content["csl_bounds"] == [(1 + 3) / 2, (5 + 3) / 2]
    assert (content["unparsable"], content["verdicts"]) == (1, 10)
    # The judge: all but one constraint; the rule: all but level 2.
    assert formats["hsr"]["levels"] == [50, 0, 50, 50, 50]
    assert formats["ssr"]["levels"] == pytest.approx(
        [50, 25, (200 / 3 + 100) / 2, (75 + 100) / 2, (80 + 100) / 2]
    )
    assert formats["csl"] == 0.5
    assert example["hsr"]["mean"] == example["csl"] == 0
    assert results["summary"]["hsr"]["mean"] == pytest.approx((80 + 40 + 0) / 3)
    assert results["summary"]["hsr"]["error"] is None  # one type has one example
    assert results["answers"]["max_new_tokens"] == 5
    shown = capsys.readouterr().out
    # Of three types, one has bounds apart.
    assert "unparsable verdicts: 1 of 25; the means lie within SSR " in shown
    assert re.search(r"HSR 36\.67 to 40\.00, CSL 0\.83 to 1\.50", shown)
    assert re.search(r"\| mine +\| this run \|", shown)
    assert re.search(r"\| UnlearnLM-Chat +\| paper +\| 42\.00 +\| 27\.87 +\|", shown)


def test_mt_bench(world, tmp_path, capsys):
    def verdict(messages):
        assert messages[0] == {"role": "system", "content": "Judge."}
        text = messages[1]["content"]
        if text.startswith("It is 4."):
            return "Rating: [[4]]"
        if text.startswith("It is 7."):
            return "I would say __import__('os')"
        return "Rating: [[9.5]]" if "Again, {question}!" in text else "Rating: [[7]]"

    files = (
        "--questions",
        world / "question.jsonl",
        "--judge-prompts",
        world / "judge_prompts.jsonl",
    )
    files += ("--reference-answers", world / "reference.jsonl")
    with stub_judge(verdict) as stub:
        run(mtbench_run, *files, *answering(world, tmp_path), *judging(stub))
        assert len(stub.requests) == 4
        again = ("--name", "mine", "--output-dir", tmp_path)
        run(mtbench_run, *files, *again, *judging(stub))
        assert len(stub.requests) == 4 + 1  # for the one that was not understood
    lines = (tmp_path / "model_answer" / "mine.jsonl").read_text().splitlines()
    answers = {line["question_id"]: line for line in map(json.loads, lines)}
    (one, two), model = answers[81]["choices"][0]["turns"], answers[81]["model_id"]
    assert model == "mine"
    lines = (tmp_path / "model_judgment" / "stub_single.jsonl").read_text().splitlines()
    judgments = {(j["question_id"], j["turn"]): j for j in map(json.loads, lines)}
    # Braces of a question are text.
    assert judgments[81, 2]["user_prompt"] == f"Write./{one}/Again, {{question}}!/{two}"
    assert judgments[111, 1]["judge"] == ["stub", "single-math-v1"]
    assert {key: j["score"] for key, j in judgments.items()} == {
        (81, 1): 7, (81, 2): 9.5, (111, 1): 4, (111, 2): None,
    }  # fmt: skip
    scores = json.loads((tmp_path / "mt-bench-mine.json").read_text())["scores"]
    assert scores["all"] == {
        "mean": pytest.approx(20.5 / 3),
        # Without one of the questions, 4 and 8.25.
        "error": pytest.approx((8.25 - 4) / 2),
        "bounds": [pytest.approx(21.5 / 4), pytest.approx(30.5 / 4)],
        "unparsable": 1,
        "verdicts": 4,
    }
    assert scores["turns"]["1"]["mean"] == 5.5
    assert scores["turns"]["2"]["mean"] == 9.5
    assert scores["categories"]["math"]["unparsable"] == 1
    shown = capsys.readouterr().out
    assert "unparsable verdicts: 1 of 4" in shown
    assert "1 of 2 verdicts unparsable: between 2.50 and 7.00" in shown


def test_the_second_turn_sees_the_first_answer(world):
    from megatron_ext.checkpoint.own_tokenizer import tokenizer_spec
    from megatron_ext.evaluation.completion import Codec
    from megatron_ext.evaluation.mtbench import read_questions, requests
    from megatron_ext.evaluation.sampling import Sampling

    codec = Codec(tokenizer_spec(world / "model"))
    questions = read_questions(world / "question.jsonl")
    answers = {81: ["An </s>answer."], 111: ["4"]}
    found = requests(questions, answers, codec, Sampling())
    tokenizer = llama.tokenizer()
    text = tokenizer.decode(found[0].tokens)
    assert text == "Write.</s>An answer.</s>Again, {question}!</s>"
    assert [request.sampling.temperature for request in found] == [0.7, 0.0]


def test_answers_under_another_template_are_not_gone_on_with(world, tmp_path, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    (tmp_path / "other.jinja").write_text(
        "{% for message in messages %}{{ message.role }}: {{ message.content }}</s>{% endfor %}"
    )
    other = ("--chat-template", tmp_path / "other.jinja")
    bench = ("--followbench", world / "bench", "--constraint-types", "content")
    questions = ("--questions", world / "question.jsonl")
    for verb, arguments in (
        (followbench_run, (*bench, *answering(world, tmp_path))),
        (mtbench_run, (*questions, *answering(world, tmp_path))),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(verb, "complete_all", interrupted)
            with pytest.raises(KeyboardInterrupt):
                run(verb, *arguments)
        with pytest.raises(ConfigError, match="expected the settings of the run"):
            run(verb, *arguments, *other)


def test_what_is_missing_is_named(world, tmp_path):
    name = ("--name", "mine", "--output-dir", tmp_path)
    judge = ("--judge-url", "http://127.0.0.1:9/v1", "--judge-model", "x")
    bench = ("--followbench", world / "bench", "--constraint-types", "content", *name)
    questions = ("--questions", world / "question.jsonl", *name)
    prompts = ("--judge-prompts", world / "judge_prompts.jsonl")
    for verb, arguments, error, message in (
        (followbench_run, bench, ConfigError, "--model to answer"),
        (followbench_run, (*bench, *judge[:2]), ConfigError, "--judge-model: expected both"),
        (followbench_run, (*bench, *judge), DataError, "content_constraint.jsonl"),
        (followbench_run, ("--followbench", tmp_path, *name, *judge), DataError, "a checkout"),
        (mtbench_run, (*questions, *judge), ConfigError, "--judge-prompts"),
        (mtbench_run, (*questions, *judge, *prompts), ConfigError, "--reference-answers"),
    ):
        with pytest.raises(error, match=re.escape(message)):
            run(verb, *arguments)


def test_the_tool_ends_without_a_traceback(server, tmp_path):
    words = ("mt-bench", "--questions", "nowhere.jsonl", "--name", "x", "--model", "nowhere")
    launch = Launch((*words, "--output-dir", tmp_path), script=ROOT / "tools" / "evaluate.py")
    ((code, output),) = server.results([launch])
    assert code == 2
    assert "nowhere.jsonl" in output.splitlines()[-1]
    assert "Traceback" not in output
