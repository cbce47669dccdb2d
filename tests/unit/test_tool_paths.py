"""What the system says of a path names the flag that gave it."""

import errno
import os
import sys
from pathlib import Path

import pytest

from tools import preprocess_data
from tools.common import ToolParser, run_tool

DENIED = f"[Errno {errno.EACCES}] {os.strerror(errno.EACCES)}"


def denied(path):
    return PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)


def said(main, words, monkeypatch, capsys):
    """The one line of a tool that fails."""
    monkeypatch.setattr(sys, "argv", ["tools/tool", *map(str, words)])
    monkeypatch.setattr("signal.signal", lambda *_: None)
    with pytest.raises(SystemExit) as leaving:
        run_tool(main)
    assert leaving.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    ("path", "flag"),
    [
        ("ckpt/chat_template.jinja", "--model ckpt: "),
        (Path("ckpt"), "--model ckpt: "),
        (Path("ckpt/iter_0000001/x").absolute(), "--checkpoint ckpt/iter_0000001: "),
        ("data/web.idx", "--data data/web: "),
        ("data/qa.bin", "--data data/qa: "),
        ("data/websites", ""),
        ("positional/x", ""),
        ("same", "--tokenizer or --also same: "),
        (3, ""),
        (None, ""),
    ],
)
def test_the_flag_of_the_nearest_path_is_named(path, flag, monkeypatch, capsys):
    def main():
        parser = ToolParser()
        parser.add_argument("--model", type=Path)
        verb = parser.add_subparsers().add_parser("go")
        verb.add_argument("--checkpoint", type=Path)
        verb.add_argument("--data", nargs="+")
        verb.add_argument("--tokenizer")
        verb.add_argument("--also")
        verb.add_argument("--none", type=Path)
        verb.add_argument("positional")
        parser.parse_args()
        raise denied(path)

    words = ["--model", "ckpt", "go", "positional", "--checkpoint=ckpt/iter_0000001"]
    words += ["--tokenizer", "same", "--also", "same", "--data", "web=data/web", "data/qa"]
    expected = f"tool: error: {flag}{denied(path)}"
    assert said(main, words, monkeypatch, capsys) == expected


def test_a_folder_of_input_without_permission(tmp_path, monkeypatch, capsys):
    folder = tmp_path / "in"
    folder.mkdir()

    def list_none(path):
        raise denied(os.fspath(path))  # root may read everything

    monkeypatch.setattr(os, "scandir", list_none)
    words = ["--input", folder, "--output-prefix", tmp_path / "out", "--tokenizer-model", "t.model"]
    words += ["--tokenizer-type", "SentencePieceTokenizer"]
    line = said(preprocess_data.main, words, monkeypatch, capsys)
    assert line == f"tool: error: --input {folder}: {DENIED}: '{folder}'"


def test_a_model_without_permission(tmp_path, monkeypatch, capsys):
    from tools import generate

    prompts, model = tmp_path / "in.jsonl", tmp_path / "model"
    prompts.write_text('{"prompt": "a"}\n')
    is_file = Path.is_file

    def look(path):
        if model in path.parents:
            raise denied(os.fspath(path))
        return is_file(path)

    monkeypatch.setattr(Path, "is_file", look)
    words = ["--input", prompts, "--model", model, "--output", tmp_path / "out.jsonl"]
    line = said(generate.main, words, monkeypatch, capsys)
    assert line == f"tool: error: --model {model}: {DENIED}: '{model}/chat_template.jinja'"
