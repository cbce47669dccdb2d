"""What the harness is given: rules, programs that are run, files by their hub names, the demo's tasks."""

import json
import os
import resource
import sys
from argparse import Namespace
from types import ModuleType, SimpleNamespace
from unittest import mock

import pytest
from huggingface_hub.constants import is_offline_mode

from examples.demo import corpus, tasks
from megatron_ext.evaluation import harness, paper
from megatron_ext.evaluation.code_execution import CodeEval, runs
from megatron_ext.evaluation.local_data import data_files, offline
from megatron_ext.evaluation.rules import KINDS, follows
from megatron_ext.evaluation.tasks.checks import process_results
from megatron_ext.exceptions import ConfigError, DataError


@pytest.mark.parametrize(
    ("rule", "argument", "good", "bad"),
    [
        ("upper", None, "A 1 B!", "A 1 b"),
        ("lower", None, "ist é 1", "ist É"),
        ("prefix", "Sure:", "  Sure: yes", "sure: yes"),
        ("at_most_words", "3", "one two\nthree", "one two three four"),
        ("bullets", "2", "- a\n\n- b", "- a\n- b\n- c"),
        ("bullets", "2", "* a b\n* c", "- a\nb"),
        ("json", None, '{"a": [1]}', "[1]"),
        ("json", None, ' {"a": 1}\n', '{"a": 1} is it'),
        ("chinese", None, "答案是 42。", "the 答案"),
        ("english", None, "It is 42.", "答案 is 42"),
    ],
)
def test_rules(rule, argument, good, bad):
    assert follows(rule, argument, good)
    assert not follows(rule, argument, bad)
    assert not follows(rule, argument, " \n")
    assert not follows(rule, argument, "")


def test_scores_of_a_request_with_two_instructions():
    items = [{"rule": "lower", "argument": ""}, {"rule": "at_most_words", "argument": "2"}]
    score = process_results({"rules": items}, ["three words here"])
    assert score == {"followed": 0.0, "case": 1.0, "length": 0.0}
    assert process_results({"rules": items}, ["two words"])["followed"] == 1.0


def test_programs_are_judged_by_their_tests():
    tests = "assert add(1, 2) == 3"
    right, wrong = "def add(a, b): return a + b", "def add(a, b): return a * b"
    leaves = right.replace("a + b", "0") + "\nraise SystemExit(0)"
    scores, passed = CodeEval(workers=2).compute(
        references=[tests, tests], predictions=[[right, wrong], [leaves, "def add("]], k=[1, 2, 3]
    )
    assert passed == {0: [True, False], 1: [False, False]}
    assert scores == {"pass@1": pytest.approx(0.25), "pass@2": pytest.approx(0.5)}


def test_programs_are_no_scripts():
    """As in `code_eval`, which runs them by `exec` under no name of their own."""
    assert runs(
        "def one(): return 1\nif __name__ == '__main__':\n    one(input())\nassert one() == 1"
    )
    assert runs(
        "from __future__ import annotations\ndef f(n): return n and f(n - 1)\nassert f(3) == 0"
    )


def test_programs_see_no_secrets_and_end(monkeypatch):
    from megatron_ext.evaluation import code_execution

    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    assert runs("import os\nassert 'OPENAI_API_KEY' not in os.environ\nassert not os.listdir()")
    monkeypatch.setattr(code_execution, "_SECONDS", 1)
    assert not runs("while True: pass")
    assert not runs("open('big', 'wb').write(bytes(1 << 22))")


def test_no_bound_is_above_those_of_this_process(monkeypatch):
    """Raising one is an error, but for root, and would end the evaluation."""
    from megatron_ext.evaluation import code_execution

    taken = {}
    memory, infinite = resource.RLIMIT_AS, resource.RLIM_INFINITY
    monkeypatch.setattr(
        resource, "getrlimit", lambda what: (0, 2**30 if what == memory else infinite)
    )
    monkeypatch.setattr(resource, "setrlimit", lambda what, bounds: taken.update({what: bounds}))
    code_execution._limit()
    assert taken[memory] == (2**30, 2**30)
    assert taken[resource.RLIMIT_CPU] == (10, 10)


def test_files_are_found_by_split(tmp_path):
    for name in ("test-00000-of-00002.parquet", "test-00001-of-00002.parquet", "dev.parquet"):
        (tmp_path / name).touch()
    (tmp_path / "README.md").touch()
    reader, splits = data_files(tmp_path)
    assert reader == "parquet"
    assert {split: len(files) for split, files in splits.items()} == {"test": 2, "dev": 1}
    assert data_files(tmp_path / "nowhere") is None


def test_libraries_that_are_imported_already_stay_off_the_hub_and_only_meanwhile(
    tmp_path, monkeypatch
):
    """Both read the variables when imported; `datasets` comes with the harness, so it is imitated."""
    names = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE")
    monkeypatch.delenv(names[0], raising=False)
    monkeypatch.setenv(names[1], "0")
    library = ModuleType("datasets")
    library.config = SimpleNamespace(HF_HUB_OFFLINE=False)  # the other name is an older one
    library.load_dataset = fetch = mock.Mock()
    monkeypatch.setitem(sys.modules, "datasets", library)

    def state():
        kept = [getattr(library.config, name, None) for name in names]
        return [is_offline_mode(), *map(os.environ.get, names), *kept]

    before = state()
    assert before == [False, None, "0", False, None]
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "test.jsonl").touch()
    with offline(tmp_path):
        assert state() == [True, "1", "1", True, True]
        library.load_dataset("set")
        with pytest.raises(DataError, match=r"--data-dir: expected the data set other at "):
            library.load_dataset("other")
    assert state() == before
    assert library.load_dataset is fetch
    fetch.assert_called_once_with("json", data_files={"test": [str(tmp_path / "set/test.jsonl")]})


def test_the_table_stands_beside_the_papers():
    scores = {task: {metric: 0.5} for task, metric in paper.BENCHMARKS.values()}
    scores["demo_sums"] = {"acc,none": 0.25, "acc_stderr,none": 0.1}
    shown = harness.report("mine", {"results": scores, "settings": {"limit": None}})
    tried = harness.report("mine", {"results": scores, "settings": {"limit": 5}})
    assert tried == f"of the first 5 samples of each task (--limit), unlike the paper's\n\n{shown}"
    rows = [
        [cell.strip() for cell in line.split("|")[1:-1]]
        for line in shown.splitlines()
        if "|" in line
    ]
    assert rows[2] == ["mine", "this run", *["50.00"] * 7]
    named = {row[0]: row for row in rows}
    # Of the paper's own table, its column of averages included.
    assert named["UnlearnLM"][2:] == ["48.09", "47.29", "47.53", "20.73", "18.60", "11.45", "32.28"]
    assert named["UnlearnLM (GA)"][-1] == "19.82"
    assert "acc 0.2500" in shown
    assert "stderr" not in shown
    assert len(named) == 3 + len(paper.BASE)
    some = harness.report(
        "mine",
        {"results": {"gsm8k": {"exact_match,strict-match": 0.1}}, "settings": {"limit": None}},
    )
    assert some.splitlines()[2].split("|")[-2].strip() == ""  # an average of one is none


def test_the_harness_is_named_where_it_is_not_installed(monkeypatch):
    monkeypatch.setattr(harness.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install -r requirements-eval\.txt"):
        harness.run(Namespace())


def test_the_papers_numbers():
    averages = {"BaseLM": 25.47, "SynthLM": 32.74, "RefineLM": 31.42}
    for model, average in averages.items():
        assert sum(paper.BASE[model]) / 6 == pytest.approx(average, abs=0.01)


def modules():
    """A small standard library."""
    for number in range(400):
        name = f"module{number}"
        doc = f"Return the value number {number} of the table."
        entry = corpus.Entry(name, f"{name}.get", "function", "get()", doc)
        yield corpus.Module(name, [entry], [])


@pytest.fixture(scope="module")
def made():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpus, "standard_library", modules)
        return tasks.build()


def test_what_is_tested_is_trained_on_nowhere(made):
    asked = " ".join(r["prompt"] for r in made["demo/instructions"]).replace("?", " ").split()
    chat = " ".join(r["messages"][0]["content"] for r in made["chat"]).replace("?", " ").split()
    for words in (asked, chat):
        assert {
            corpus.split_of(w.removesuffix(".get")) for w in words if w.startswith("module")
        } == {"instruction" if words is asked else "train"}
    sums = corpus.split_sums()
    trained = {f"What is {s.left} {s.operator} {s.right}?" for s in sums["train"]}
    held_out = {r["question"].splitlines()[0] for r in made["demo/sums"]}
    assert len(held_out) == len(sums["heldout"])
    assert not trained & held_out
    signs = {"plus": "+", "minus": "-", "times": "*"}
    for record in made["chat"]:
        words = record["messages"][0]["content"].replace("?", " ").split()[2:5]
        if words[1] in signs:
            words[1] = signs[words[1]]
            assert f"What is {' '.join(words)}?" not in trained | held_out


def test_choices_and_instructions_are_sound(made):
    for record in made["demo/sums"]:
        left, operator, right = record["question"].split("?")[0].split()[2:]
        result = {"+": int.__add__, "-": int.__sub__, "*": int.__mul__}[operator](
            int(left), int(right)
        )
        assert record["choices"][record["answer"]] == str(result)
        assert len(set(record["choices"])) == 4
    for name in ("demo/definitions", "demo/definitions_seen"):
        for record in made[name]:
            number = record["question"].split(".get")[0].rpartition("module")[2]
            assert f" {number} of" in record["choices"][record["answer"]]
    rules = [item["rule"] for r in made["demo/instructions"] for item in r["rules"]]
    assert set(rules) == set(KINDS)
    assert json.loads(json.dumps(made)) == made
    # Each conversation with an instruction follows it, or `build` would have failed.
    assert sum("JSON" in r["messages"][0]["content"] for r in made["chat"]) > 10
