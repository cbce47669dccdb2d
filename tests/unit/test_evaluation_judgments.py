"""MT-Bench's file of judgments, which models and judges share."""

import json
import logging
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

    def run(url: str, judge: str, *more: str) -> None:
        parser = ArgumentParser()
        mtbench_run.add_arguments(parser)
        words = ["--questions", str(tmp_path / "question.jsonl"), "--name", "mine"]
        words += ["--judge-prompts", str(tmp_path / "judge_prompts.jsonl")]
        words += ["--output-dir", str(tmp_path), "--judge-url", url, "--judge-model", judge]
        options = parser.parse_args([*words, *more])
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


def results(folder):
    return json.loads((folder / "mt-bench-mine.json").read_text())


def test_only_what_could_not_be_parsed_is_asked_again(judge_with, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    file = tmp_path / "model_judgment" / "stub_single.jsonl"
    with stub_judge(
        lambda messages: "Hm." if "-turn" in messages[1]["content"] else "[[5]]"
    ) as stub:
        judge_with(stub.url, "stub")
        assert len(stub.requests) == 2
        assert "are taken from" not in caplog.text
        before = file.read_text().splitlines()
        assert json.loads(before[1])["score"] is None
        stub.verdict = lambda messages: "[[7]]"
        judge_with(stub.url, "stub")
        assert len(stub.requests) == 3
        assert f"1 of 2 verdicts are taken from {file}" in caplog.messages
        judge_with(stub.url, "stub")
        assert len(stub.requests) == 3
    lines = file.read_text().splitlines()
    assert lines[0] == before[0]
    assert [json.loads(line)["score"] for line in lines] == [5, 7]


def test_a_verdict_that_was_cut_is_told_and_asked_again(judge_with, tmp_path, capsys):
    """Also one that has a rating in it already: the judge had not come to its end."""
    with stub_judge(lambda messages: "Better than [[2]] but no more: [[5]]") as stub:
        stub.limit = 4
        judge_with(stub.url, "stub", "--judge-max-tokens", "4")
        assert results(tmp_path)["scores"]["all"]["mean"] is None
        assert results(tmp_path)["judge"] | {"url": ""} == {
            "url": "", "model": "stub", "max_tokens": 4, "cut": 2,
        }  # fmt: skip
        shown = capsys.readouterr().out
        assert (
            "unparsable verdicts: 2 of 2\ncut by --judge-max-tokens 4: 2 of the unparsable" in shown
        )
        stub.limit = None
        judge_with(stub.url, "stub")
        assert len(stub.requests) == 4
        assert "cut by" not in capsys.readouterr().out
    assert results(tmp_path)["judge"]["cut"] == 0


def test_verdicts_under_another_system_prompt_are_no_verdicts(judge_with, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    prompts, file = tmp_path / "judge_prompts.jsonl", tmp_path / "model_judgment/stub_single.jsonl"
    with stub_judge(lambda messages: "[[5]]") as stub:
        judge_with(stub.url, "stub")
        prompts.write_text(prompts.read_text().replace("Judge.", "Be strict."))
        judge_with(stub.url, "stub")
        assert len(stub.requests) == 4
        # Earlier versions, and the project, do not write it.
        lines = [json.loads(line) for line in file.read_text().splitlines()]
        for line in lines:
            assert line.pop("system_prompt") == "Be strict."
        file.write_text("\n".join(map(json.dumps, lines)))
        judge_with(stub.url, "stub")
        assert len(stub.requests) == 4
    note = "(2 of them without their system prompt, taken for the present one)"
    assert f"2 of 2 verdicts are taken from {file} {note}" in caplog.messages
    assert "system_prompt" not in file.read_text()  # which is still not known


def test_scores_of_another_judge_are_kept(judge_with, tmp_path):
    with stub_judge(lambda messages: "[[5]]") as stub:
        for judge in ("of/a", "..", "of/a", "b"):
            judge_with(stub.url, judge)
    assert results(tmp_path)["judge"]["model"] == "b"
    kept = sorted((tmp_path / "other_judges").rglob("*.json"))
    assert [str(path.relative_to(tmp_path / "other_judges")) for path in kept] == [
        "%2E%2E/mt-bench-mine.json",
        "of%2Fa/mt-bench-mine.json",
    ]
    found = [json.loads(path.read_text())["judge"]["model"] for path in kept]
    assert found == ["..", "of/a"]
