"""FollowBench's verdicts: a judge's own files, and which of them are used again."""

import json
import logging
from argparse import ArgumentParser

import pytest

from megatron_ext.evaluation import followbench, followbench_run
from megatron_ext.evaluation.followbench_data import Question
from megatron_ext.evaluation.records import read_records, write_records
from tests.helpers.judge import stub_judge

KINDS = ("content", "style")


class Checkout:
    """An example of each type, which a judge judges."""

    def questions(self, kind):
        return [Question(kind, 1, level, f"{kind} {level}", (), {}) for level in range(1, 6)]

    def is_ruled(self, question):
        return False

    def judge_prompt(self, question, answer):
        return f"{question.instruction}: {answer}"


@pytest.fixture
def judge_with(tmp_path, monkeypatch):
    """Judges answers that are there; `judge_with(url, judge, *kinds)`."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(followbench_run, "Checkout", lambda folder, language: Checkout())
    for kind in KINDS:
        lines = [followbench.record(q.instruction, "one") for q in Checkout().questions(kind)]
        file = followbench.answer_file(tmp_path, "mine", kind)
        write_records(file, lines, overwrite=False)

    def run(url, judge, *kinds):
        parser = ArgumentParser()
        followbench_run.add_arguments(parser)
        words = ["--followbench", "unread", "--name", "mine", "--output-dir", str(tmp_path)]
        words += ["--judge-url", url, "--judge-model", judge]
        options = parser.parse_args([*words, "--constraint-types", *(kinds or KINDS)])
        options.is_writer = True
        followbench_run.run(options)

    return run


def verdict(messages):
    """All is satisfied."""
    return str(["YES"] * int(messages[0]["content"].split(":")[0][-1]))


def judges(folder):
    """Whose verdicts are where; each file has those of one."""
    found = {}
    for file in sorted(folder.rglob("gpt4_discriminative_eval_output/mine/*.jsonl")):
        (judge,) = {line.get("judge") for line in read_records(file)}
        found[str(file.relative_to(folder))] = judge
    return found


def test_verdicts_and_scores_of_another_judge_are_kept_and_come_back(judge_with, tmp_path):
    content, style = (
        f"gpt4_discriminative_eval_output/mine/{kind}_constraint.jsonl" for kind in KINDS
    )
    with stub_judge(verdict) as stub:
        judge_with(stub.url, "of/a")
        assert len(stub.requests) == 10
        judge_with(stub.url, "b", "style")
        assert len(stub.requests) == 15
        # The project's scripts read a folder: it is of one judge, also where not all types were judged.
        apart = "other_judges/of%2Fa/"
        assert judges(tmp_path) == {
            style: "b", apart + content: "of/a", apart + style: "of/a",
        }  # fmt: skip
        name = "followbench-mine.json"
        for folder, judge in ((tmp_path, "b"), (tmp_path / apart, "of/a")):
            assert json.loads((folder / name).read_text())["judge"]["model"] == judge
        judge_with(stub.url, "of/a")
        assert len(stub.requests) == 15
    assert judges(tmp_path) == {
        content: "of/a", style: "of/a", "other_judges/b/" + style: "b",
    }  # fmt: skip
    assert [str(path.relative_to(tmp_path)) for path in tmp_path.rglob(name)] == [
        name, f"other_judges/b/{name}",
    ]  # fmt: skip


def test_verdicts_that_name_no_judge_are_kept_and_not_used(judge_with, tmp_path):
    """The project's own, and those of earlier versions."""
    file = followbench.verdict_file(tmp_path, "mine", "content")
    write_records(file, [followbench.record("content 1: one", "YES")], overwrite=False)
    with stub_judge(verdict) as stub:
        judge_with(stub.url, "a", "content")
        assert len(stub.requests) == 5
    assert sorted(map(str, judges(tmp_path).values())) == ["None", "a"]
    assert (tmp_path / "other_judges" / "unknown" / file.relative_to(tmp_path)).exists()


def test_only_what_could_not_be_parsed_is_asked_again(judge_with, tmp_path, caplog, capsys):
    """A text that was cut is no verdict, whatever its last line has in it."""
    caplog.set_level(logging.INFO)
    with stub_judge(lambda messages: f"So, if it is YES: {verdict(messages)}") as stub:
        stub.limit = 5
        judge_with(stub.url, "a", "content")
        shown = capsys.readouterr().out
        assert "unparsable verdicts: 5 of 5" in shown
        assert (
            "cut by --judge-max-tokens 2048: 5 of the unparsable verdicts; with a higher" in shown
        )
        file = followbench.verdict_file(tmp_path, "mine", "content")
        assert "YES:" in file.read_text().splitlines()[0]
        for limit, asked in ((6, 5), (3, 4), (None, 4), (None, 0)):  # level 1 has six words
            stub.limit, before = limit, len(stub.requests)
            judge_with(stub.url, "a", "content")
            assert len(stub.requests) - before == asked
    assert f"1 of 5 verdicts are taken from {file}" in caplog.messages
    results = json.loads((tmp_path / "followbench-mine.json").read_text())
    assert (results["summary"]["unparsable"], results["judge"]["cut"]) == (0, 0)
