"""MT-Bench's file of judgments, which models and judges share."""

import json
from argparse import ArgumentParser

import pytest

from megatron_ext.evaluation import mtbench_run
from tests.helpers.judge import stub_judge


@pytest.fixture
def judge_with(tmp_path, monkeypatch):
    """Rates the answers of a model, which are there; `judge_with(url, judge)`."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    names = ("single-v1", "single-v1-multi-turn", "single-math-v1", "single-math-v1-multi-turn")
    template = "{question_1} {answer_1} {question_2} {answer_2}"
    prompts = [
        {"name": name, "system_prompt": "Judge.", "prompt_template": f"{name} {template}"}
        for name in names
    ]
    files = {
        "question.jsonl": [
            {"question_id": 81, "category": "writing", "turns": ["Write.", "Again!"]}
        ],
        "judge_prompts.jsonl": prompts,
        "model_answer/mine.jsonl": [{"question_id": 81, "choices": [{"turns": ["one", "two"]}]}],
    }
    (tmp_path / "model_answer").mkdir()
    for name, lines in files.items():
        (tmp_path / name).write_text("\n".join(map(json.dumps, lines)))

    def run(url: str, judge: str) -> None:
        parser = ArgumentParser()
        mtbench_run.add_arguments(parser)
        words = ["--questions", str(tmp_path / "question.jsonl"), "--name", "mine"]
        words += ["--judge-prompts", str(tmp_path / "judge_prompts.jsonl")]
        words += ["--output-dir", str(tmp_path), "--judge-url", url, "--judge-model", judge]
        options = parser.parse_args(words)
        options.is_writer = True
        mtbench_run.run(options)

    return run


def kept(folder, judge):
    lines = (folder / "model_judgment" / f"{judge}_single.jsonl").read_text().splitlines()
    return [(line["model"], line["judge"][0]) for line in map(json.loads, lines)]


def test_judges_whose_names_differ_by_a_slash_share_a_file_and_no_verdict(judge_with, tmp_path):
    with stub_judge(lambda messages: "[[5]]") as stub:
        for judge in ("of/a", "of_a", "of/a", "of_a"):
            judge_with(stub.url, judge)
    assert [request["model"] for request in stub.requests] == ["of/a"] * 2 + ["of_a"] * 2
    assert sorted(kept(tmp_path, "of_a")) == [("mine", "of/a")] * 2 + [("mine", "of_a")] * 2


def test_what_was_judged_meanwhile_is_kept(judge_with, tmp_path):
    other = {"model": "other", "judge": ["stub", "single-v1"], "user_prompt": "?", "judgment": "!"}

    def verdict(messages):
        folder = tmp_path / "model_judgment"
        folder.mkdir(exist_ok=True)
        (folder / "stub_single.jsonl").write_text(json.dumps(other))  # by another process
        return "[[5]]"

    with stub_judge(verdict) as stub:
        judge_with(stub.url, "stub")
    assert sorted(kept(tmp_path, "stub")) == [("mine", "stub")] * 2 + [("other", "stub")]
