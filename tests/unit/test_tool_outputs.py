"""Outputs that cannot be written are refused by their flag, before anything else is looked at."""

import sys

import pytest

from megatron_ext.data.atomic import check_place
from megatron_ext.exceptions import ConfigError
from tools import (
    convert_checkpoint,
    evaluate,
    generate,
    merge_data,
    preflight,
    preprocess_data,
)
from tools import train_tokenizer as train
from tools.common import run_tool

SENTENCEPIECE = ("--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", "none.model")
BENCH = ("--name", "mine", "--model", "none", "--output-dir")
# The tool, its words up to the value of the flag that names the output, and that flag.
TOOLS = [
    (train, ("--input", "none.jsonl", "--vocab-size", "300", "--output")),
    (preprocess_data, ("--input", "none.jsonl", *SENTENCEPIECE, "--output-prefix")),
    (generate, ("--input", "none.jsonl", "--model", "none", "--output")),
    (convert_checkpoint, ("import", "--source", "none", "--output")),
    (convert_checkpoint, ("export", "--checkpoint", "none", "--output")),
    (evaluate, ("mt-bench", "--questions", "none.jsonl", *BENCH)),
    (evaluate, ("followbench", "--followbench", "none", *BENCH)),
    (merge_data, ("none", "none", "--output")),
    (preflight, ("--json",)),
    (preflight, ("--table",)),
]


@pytest.mark.parametrize(("tool", "words"), TOOLS)
def test_an_output_below_a_file_is_named_before_any_work(tool, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tok.model").touch()
    monkeypatch.setattr(sys, "argv", ["tool", *words, "tok.model/x"])
    with pytest.raises(ConfigError) as refused:
        tool.main()
    assert str(refused.value) == (
        f"{words[-1]} tok.model/x: expected a place to write to, found that {tmp_path / 'tok.model'} "
        "is a file"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["tok.model"]


@pytest.mark.parametrize("name", ["../u", "a/b", "..", ""])
@pytest.mark.parametrize(("tool", "words"), TOOLS[5:7])
def test_a_name_does_not_lead_out_of_its_folder(tool, words, name, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["tool", *words, str(tmp_path), "--name", name])
    with pytest.raises(ConfigError, match=f"^--name: expected a name without / .*, found '{name}'"):
        tool.main()


@pytest.mark.parametrize("size", ["0", "-1", "nan", "inf"])
def test_a_shard_of_no_size(size, monkeypatch):
    words = ("export", "--checkpoint", "none", "--output", "none", "--max-shard-size", size)
    monkeypatch.setattr(sys, "argv", ["tool", *words])
    with pytest.raises(ConfigError, match=f"^--max-shard-size: .* above 0, found {size}$"):
        convert_checkpoint.main()


def test_a_folder_to_write_into_may_be_there(tmp_path):
    (tmp_path / "file").touch()
    check_place(tmp_path, flag="--output-dir", is_folder=True)
    check_place(tmp_path / "to" / "be" / "made", flag="--output")
    check_place(tmp_path / "file", flag="--output")  # may be overwritten
    with pytest.raises(ConfigError, match=r"^--output-dir .* is a file$"):
        check_place(tmp_path / "file", flag="--output-dir", is_folder=True)


def test_a_folder_without_permission(tmp_path, monkeypatch):
    monkeypatch.setattr("os.access", lambda path, mode: False)  # root may write everywhere
    with pytest.raises(ConfigError, match=f"^--output .* found that {tmp_path} cannot be written$"):
        check_place(tmp_path / "new" / "file", flag="--output")


@pytest.mark.parametrize(
    ("rank", "kept", "said"),
    [
        ("0", (), "tool: interrupted, nothing was written\n"),
        ("0", ("26 of 1,200 are in out",), "tool: interrupted; 26 of 1,200 are in out\n"),
        ("1", (), ""),
    ],
)
def test_what_is_interrupted_says_what_is_kept(rank, kept, said, monkeypatch, capsys):
    def main():
        raise KeyboardInterrupt(*kept)

    monkeypatch.setattr(sys, "argv", ["tools/tool"])
    monkeypatch.setattr("signal.signal", lambda *_: None)
    monkeypatch.setenv("RANK", rank)
    with pytest.raises(SystemExit) as leaving:
        run_tool(main)
    assert (leaving.value.code, capsys.readouterr().err) == (130, said)
