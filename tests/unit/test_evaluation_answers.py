"""Answers that are there are a model's own only if it made them, as this run would."""

import json
import re
from argparse import ArgumentParser
from contextlib import contextmanager
from types import SimpleNamespace

import pytest

from megatron_ext.evaluation import followbench, followbench_run, mtbench_run
from megatron_ext.evaluation.completion import Completion
from megatron_ext.evaluation.followbench_data import Question
from megatron_ext.exceptions import ConfigError
from tests.helpers.judge import stub_judge

KINDS = ("content", "style")


@pytest.fixture
def bench(request, tmp_path, monkeypatch):
    """`bench(*words, model=...)`: one of both verbs, over a model that answers with its name."""
    verb = request.param
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    opened = []

    @contextmanager
    def open_generator(options):
        opened.append(options.model.name)
        source = str(options.chat_template or "{{ messages }}")
        codec = SimpleNamespace(
            digest=options.tokenizer_model or "0" * 64,
            template=SimpleNamespace(source=source, end_of_turn=1),
            eod=0,
            declared=run.declared,
        )
        yield SimpleNamespace(identity=64 * options.model.name[0], is_writer=True), codec

    monkeypatch.setattr(verb, "open_generator", open_generator)
    words = ["--name", "chat", "--output-dir", str(tmp_path)]
    if verb is mtbench_run:
        questions = tmp_path / "question.jsonl"
        line = {"question_id": 81, "category": "writing", "turns": ["Write.", "Again!"]}
        questions.write_text(json.dumps(line))
        names = ("single-v1", "single-v1-multi-turn", "single-math-v1", "single-math-v1-multi-turn")
        prompts = [{"name": n, "system_prompt": "", "prompt_template": n} for n in names]
        (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, prompts)))
        words += ["--questions", str(questions), "--judge-prompts", str(tmp_path / "prompts.jsonl")]
        monkeypatch.setattr(verb, "_two_turns", lambda *_: {81: [opened[-1], opened[-1]]})
    else:
        words += ["--followbench", "unread"]
        monkeypatch.setattr(verb, "Checkout", lambda folder, language: Checkout())
        monkeypatch.setattr(followbench, "requests", lambda asked, *_: asked)
        monkeypatch.setattr(
            verb,
            "complete_all",
            lambda _, __, asked, **___: {q.key: Completion(opened[-1], "stop", 1) for q in asked},
        )

    def run(*more, model=None, judge=None, judge_model="stub"):
        parser = ArgumentParser()
        verb.add_arguments(parser)
        named = ["--model", str(tmp_path / model)] if model else []
        if judge:
            named += ["--judge-url", judge, "--judge-model", judge_model]
        if verb is followbench_run and "--constraint-types" not in more:
            named += ["--constraint-types", *KINDS]
        options = parser.parse_args([*words, *named, *map(str, more)])
        options.is_writer = True
        verb.run(options)

    run.opened, run.declared = opened, frozenset([0, 1])
    run.name = "mt-bench" if verb is mtbench_run else "followbench"
    folder = tmp_path / ("model_answer" if verb is mtbench_run else "api_output/chat")
    name = "chat" if verb is mtbench_run else "content_constraint"
    run.answers, run.settings = folder / f"{name}.jsonl", folder / f"{name}.settings.json"
    return run


class Checkout:
    """Two examples of a type, which a judge judges."""

    def questions(self, kind):
        return [
            Question(kind, example, level, f"{kind} {example} {level}", (), {})
            for example in (1, 2)
            for level in range(1, 6)
        ]

    def is_ruled(self, question):
        return False

    def judge_prompt(self, question, answer):
        return f"{question.instruction}: {answer}"


both = pytest.mark.parametrize("bench", [mtbench_run, followbench_run], indirect=True)


@both
def test_answers_of_another_model_are_not_taken_for_its_own(bench, tmp_path):
    bench(model="first")
    before = bench.answers.read_bytes()
    bench(model="first")
    assert bench.answers.read_bytes() == before
    with pytest.raises(ConfigError) as found:
        bench(model="second")
    assert str(found.value).startswith(
        f"{bench.answers}: expected answers with the settings of this run, found answers of "
        f"{tmp_path / 'first'} with others ("
    )
    assert "--model: expected ssssssssssss…, found ffffffffffff…" in str(found.value)
    assert "--overwrite answers again" in str(found.value)
    assert bench.answers.read_bytes() == before
    bench("--overwrite", model="second")
    assert b"second" in bench.answers.read_bytes()
    bench(model="second")


@both
@pytest.mark.parametrize(
    ("words", "message", "is_loaded"),
    [
        (("--seed", 77), "--seed: expected 77, found ", False),
        (("--max-new-tokens", 3), "--max-new-tokens: expected 3, found ", False),
        (("--top-p", 0.5), "--top-p: expected 0.5, found 1.0", False),
        (("--chat-template", "t"), "--chat-template: expected t, found {{ messages }}", True),
        (("--tokenizer-model", "t"), "--tokenizer-model: expected t, found 000000000000…", True),
    ],
)
def test_answers_with_other_settings_are_refused_before_the_model_is_loaded_where_it_can_be(
    bench, words, message, is_loaded
):
    bench(model="first")
    with pytest.raises(ConfigError, match=re.escape(message)):
        bench(*words, model="first")
    assert len(bench.opened) == 1 + is_loaded


@both
def test_tokens_that_a_models_files_declare_are_settings_where_they_add_any(bench):
    bench(model="first")
    assert "eos_token_id" not in json.loads(bench.settings.read_text())
    bench.declared = frozenset([0, 7, 5])
    with pytest.raises(ConfigError, match=r"with others \(eos_token_id: expected \[5, 7\], found "):
        bench(model="first")
    bench("--overwrite", model="first")
    assert json.loads(bench.settings.read_text())["eos_token_id"] == [5, 7]


@both
def test_answers_that_nothing_is_known_of_are_judged_and_not_reused(bench, tmp_path):
    bench(model="first")
    with stub_judge(lambda messages: "[[5]] YES") as stub:
        bench(model="first", judge=stub.url)
        summary = tmp_path / f"{bench.name}-chat.json"
        made_with = json.loads(summary.read_text())["answers"]
        assert made_with["model"] == "f" * 64
        assert made_with["top_p"] == 1
        assert made_with["model_path"] == str(tmp_path / "first")
        assert made_with["chat_template"] == "{{ messages }}"
        bench(judge=stub.url)
        assert json.loads(summary.read_text())["answers"] == made_with

        # A file that was put in their place has none of their settings, nor has one of an earlier version.
        bench.answers.write_bytes(bench.answers.read_bytes().replace(b"first", b"other"))
        for reason in ("is about other answers", "is not there"):
            with pytest.raises(ConfigError, match=f"are not known .*{reason}.*--overwrite"):
                bench(model="first")
            bench(judge=stub.url)
            assert json.loads(summary.read_text())["answers"] is None
            bench.settings.unlink(missing_ok=True)
    assert len(bench.opened) == 2


@pytest.mark.parametrize("bench", [followbench_run], indirect=True)
def test_constraint_types_of_two_models_are_not_scored_together(bench):
    for model, kind in (("first", "content"), ("second", "style")):
        bench("--constraint-types", kind, model=model)
    with stub_judge(lambda messages: "YES") as stub:
        message = (
            r"style_constraint.jsonl: expected .*content_constraint.jsonl.* others of --model;"
        )
        with pytest.raises(ConfigError, match=message):
            bench(judge=stub.url)
        assert not stub.requests
        # Types that are there are held against this run before others are answered.
        with pytest.raises(ConfigError, match=r"content_constraint\.jsonl: expected"):
            bench("--constraint-types", "content", "format", model="second")
        assert not bench.answers.with_name("format_constraint.jsonl").exists()
        bench("--constraint-types", "content", model="first", judge=stub.url)
