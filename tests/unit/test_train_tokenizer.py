"""What of its input a tokenizer is trained on."""

import sys
from collections import Counter

import pytest

from megatron_ext.data import documents
from megatron_ext.data.train_tokenizer import TrainTokenizerConfig, _Lines
from tests.helpers.text import make_texts, write_jsonl
from tools import train_tokenizer as tool


def learned(folder, **settings):
    """How often training reads each character, and of how many files it reads something, and a part."""
    config = TrainTokenizerConfig(inputs=[str(folder)], output="none", vocab_size=300, **settings)
    lines = _Lines(config)
    counts = Counter("".join(lines))
    assert lines.text_bytes == sum(len(c.encode()) * n for c, n in counts.items())
    return counts, (lines.files_read, lines.files_cut)


def test_a_part_of_every_file_is_read_by_its_size(tmp_path):
    for name, count in (("a", 400), ("b", 1200), ("c", 0), ("d", 400)):
        (tmp_path / f"{name}.jsonl").write_text(f'{{"text": "{name * 10}"}}\n' * count)
    counts, files = learned(tmp_path, max_bytes=5000)
    assert counts == {"a": 1000, "b": 3000, "d": 1000}
    assert files == (3, 3)
    assert learned(tmp_path) == ({"a": 4000, "b": 12000, "d": 4000}, (4, 0))


def test_what_a_file_lacks_of_its_share_is_read_from_the_next(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", [{"text": "a", "other": "x" * 20_000}])
    write_jsonl(tmp_path / "b.jsonl", [{"text": "b"}] * 1000)
    assert learned(tmp_path, max_bytes=800) == ({"a": 1, "b": 799}, (2, 1))


def test_of_many_small_files_some_are_left_out_evenly(tmp_path):
    for i in range(100):
        (tmp_path / f"{i:03}.txt").write_text(chr(0x4E00 + i) * 10)
    counts, files = learned(tmp_path, max_bytes=300)
    assert sorted(ord(c) - 0x4E00 for c in counts) == list(range(0, 100, 10))
    assert files == (10, 0)


def test_a_large_text_is_read_in_part_and_line_by_line(tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "BLOCK_BYTES", 64)
    monkeypatch.setattr(documents, "_RECORD_BYTES", 640)
    (tmp_path / "a.txt").write_text("aaaaaaaaa\n\n" * 1000)
    assert learned(tmp_path, max_bytes=900) == ({"a": 900}, (1, 1))


def test_the_tool_says_of_how_many_files_it_has_read(tmp_path, monkeypatch, capsys):
    for name in "ab":
        write_jsonl(tmp_path / f"{name}.jsonl", [{"text": text} for text in make_texts(200)])
    words = ["--input", str(tmp_path), "--vocab-size", "400", "--output", str(tmp_path / "t.model")]
    monkeypatch.setattr(sys, "argv", ["tool", *words, "--max-bytes", "20000"])
    tool.main()
    assert "\n2 of 2 files read, 2 in part (--max-bytes)\n" in capsys.readouterr().out


@pytest.mark.parametrize(("text", "number"), [("1e9", 10**9), ("20_000", 20_000), ("2.5e3", 2500)])
def test_bytes_are_a_whole_number_however_it_is_written(text, number):
    words = ["--input", "a", "--vocab-size", "400", "--output", "b", "--max-bytes", text]
    assert tool.parse_args(words).max_bytes == number


@pytest.mark.parametrize("text", ["1.5", "1e-3", "inf", "nan", "1 GB"])
def test_other_bytes_are_refused_as_they_were_written(text, capsys):
    words = ["--input", "a", "--vocab-size", "400", "--output", "b", "--max-bytes", text]
    with pytest.raises(SystemExit):
        tool.parse_args(words)
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.endswith(f"argument --max-bytes: expected a whole number, found '{text}'")
