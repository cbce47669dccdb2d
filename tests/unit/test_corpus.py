"""The demo's corpus: what each file claims to be, and that no file leaks into another."""

import json
import random
import re

import pytest

from examples.demo import corpus, wording
from megatron_ext.exceptions import ConfigError

RIGID = re.compile(r"Question: .+\n\n\*\*Answer:\*\* .+\n\nSummary: .+\n", re.DOTALL)


@pytest.fixture(scope="module")
def documents():
    return corpus.build_corpus()


def test_sizes_fit_the_demo(documents):
    """Some 2.5 M tokens of 3 bytes are trained on; perplexities need some 20 k tokens each."""
    sizes = {name: sum(len(text.encode()) for text in texts) for name, texts in documents.items()}
    assert 5e6 < sizes["real"] < 15e6
    assert 1e6 < sizes["synthetic"] < 4e6
    assert min(sizes[name] for name in corpus.NAMES[2:]) > 60_000


def test_no_document_is_in_two_files_or_twice(documents):
    texts = [text for name in corpus.NAMES for text in documents[name]]
    assert len(set(texts)) == len(texts)


def test_modules_do_not_cross_splits(documents):
    named = {
        name: set(re.findall(r"(?:of the module|is the purpose of the module) `([^`]+)`", text))
        for name in ("synthetic", "synthetic_heldout")
        for text in ["\n".join(documents[name])]
    }
    assert len(named["synthetic"]) > 100
    assert len(named["synthetic_heldout"]) > 5
    assert {corpus.split_of(module) for module in named["synthetic"]} == {"train"}
    assert {corpus.split_of(module) for module in named["synthetic_heldout"]} == {"heldout"}


def test_problems_do_not_cross_splits(documents):
    def problems(name):
        found = re.findall(r"What is (\d+) ([-+*]) (\d+)\?", "\n".join(documents[name]))
        return {(operator, frozenset((a, b))) for a, operator, b in found}

    train, heldout = problems("synthetic"), problems("synthetic_heldout")
    assert len(train) > 5000
    assert len(heldout) == 300
    assert not train & heldout


def test_formats(documents):
    for name in ("synthetic", "synthetic_heldout"):
        assert all(RIGID.fullmatch(text) for text in documents[name])
    for name in ("real", "real_heldout", "instruction"):
        assert not any("**Answer:**" in text or "Question:" in text for text in documents[name])
    assert len({text.split()[0] for text in documents["instruction"]}) > 12


def test_answers_are_right(documents):
    sums = [text for text in documents["synthetic"] if "(A)" in text]
    for text in sums:
        left, operator, right = re.search(r"What is (\d+) ([-+*]) (\d+)\?", text).groups()
        choices = dict(re.findall(r"^\(([A-D])\) (\d+)$", text, re.MULTILINE))
        letter, answer = re.search(r"\*\*Answer:\*\* \(([A-D])\) (\d+)", text).groups()
        expected = {
            "+": int(left) + int(right),
            "-": int(left) - int(right),
            "*": int(left) * int(right),
        }
        assert int(answer) == expected[operator]
        assert [k for k, v in choices.items() if v == answer] == [letter]
        assert len(set(choices.values())) == 4


def test_source_is_code_without_docstrings(documents):
    import ast

    parts = [text for text in documents["real"] if text.startswith(("import ", "from "))]
    assert len(parts) > 20
    parsed = 0
    for text in parts:
        try:
            tree = ast.parse(text)
        except SyntaxError:
            continue  # cut in the middle of an if statement's arms, for one
        parsed += 1
        functions = [
            n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef) and len(n.body) > 1
        ]
        assert not any(ast.get_docstring(function) for function in functions)
    assert parsed > 0.9 * len(parts)


def test_builds_are_equal(documents):
    assert corpus.build_corpus() == documents


def test_continued_keeps_names():
    assert wording.continued("Return it.") == "return it."
    assert wording.continued("PurePath subclass.") == "PurePath subclass."
    assert wording.continued("A thing.") == "a thing."


def test_differences_are_not_negative():
    sums = wording.distinct_sums(500, random.Random(0))
    assert len(set(sums)) == 500
    assert min(item.result for item in sums) >= 0


def test_written_files(tmp_path, documents):
    few = {name: texts[:3] for name, texts in documents.items()}
    paths = corpus.write_corpus(few, tmp_path, overwrite=False)
    assert [path.name for path in paths] == [f"{name}.jsonl" for name in corpus.NAMES]
    for path, texts in zip(paths, few.values(), strict=True):
        assert [json.loads(line) for line in path.open()] == [{"text": text} for text in texts]
    with pytest.raises(ConfigError, match="exists"):
        corpus.write_corpus(few, tmp_path, overwrite=False)
