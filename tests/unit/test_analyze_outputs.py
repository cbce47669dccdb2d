"""What the verbs of analyze.py write, and what they refuse before any work."""

import contextlib
import json
import sys
from argparse import Namespace

import pytest

from megatron_ext.analysis.records import record_run
from megatron_ext.checkpoint.own_tokenizer import choose_tokenizer
from megatron_ext.exceptions import CheckpointError, ConfigError
from tests.helpers.text import train_sentencepiece, write_dataset
from tools import analyze

TEXTS = [[number, number + 1, 2] for number in range(4, 60)]


class Session:
    """Scores every model alike, but fails at those whose name is in `broken`; counts what it is asked."""

    is_writer = True

    def __init__(self, broken):
        self.broken, self.asked = broken, []

    def check_models(self):
        """All are of one architecture."""

    def perplexities(self, directory, sets):
        self.asked.append(directory)
        if directory in self.broken:
            raise self.broken[directory]
        scores = {"loss": [1.0, 2.0, 4.0], "probability": [0.4, 0.2, 0.1], "tokens": [3, 3, 3]}
        scores["corpus_perplexity"] = 3.0
        return {"label": directory, "sets": {name: dict(scores) for name in sets}}


@pytest.fixture
def text(tmp_path):
    """Two sets of text, and their tokenizer, as flags."""
    sets = [f"{name}={write_dataset(tmp_path / name, TEXTS)}" for name in ("real", "qa")]
    return ("--data", *sets, "--tokenizer-model", str(train_sentencepiece(tmp_path / "t.model")))


@pytest.fixture
def call(monkeypatch):
    """Runs a verb, over a session that loads no model."""

    def run(*arguments, broken=()):
        session = Session(dict(broken))
        monkeypatch.setattr(analyze, "_analysis", lambda options: contextlib.nullcontext(session))
        monkeypatch.setattr(sys, "argv", ["analyze.py", *map(str, arguments)])
        analyze.main()
        return session

    return run


@pytest.mark.parametrize("verb", ["tokens", "embeddings", "perplexity"])
def test_places_that_cannot_be_written_are_refused_before_any_work(verb, text, call, tmp_path):
    model = () if verb == "tokens" else ("--checkpoint", "a")
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    (tmp_path / "y.png").mkdir()
    cases = {
        "found that .*file is a file": tmp_path / "file" / "x" / "out.json",
        "expected a JSON file, found a folder": tmp_path / "folder",
        "expected a JSON file, found a picture": tmp_path / "x.png",
        "y.png: expected a file to write, or nothing, found a folder": tmp_path / "y.json",
    }
    for message, output in cases.items():
        with pytest.raises(ConfigError, match=message):
            call(verb, *model, *text, "--output", output, broken={"a": AssertionError("too late")})


def test_a_folder_without_permission_is_refused(text, call, tmp_path, monkeypatch):
    monkeypatch.setattr("os.access", lambda path, mode: path != tmp_path)  # root may write anywhere
    with pytest.raises(ConfigError, match=f"^--output .* found that {tmp_path} cannot be"):
        call("perplexity", "--checkpoint", "a", *text, "--output", tmp_path / "new" / "out.json")


@pytest.mark.parametrize(
    ("stop", "said"),
    [(CheckpointError("no tensors"), "no tensors"), (KeyboardInterrupt(), "out.json has 2 of 3")],
)
def test_finished_models_outlive_one_that_fails(stop, said, text, call, tmp_path):
    output = tmp_path / "out.json"
    models = ("--checkpoint", "a", "b", "c")
    with pytest.raises(type(stop), match=said):
        call("perplexity", *models, *text, "--output", output, broken={"c": stop})
    report = json.loads(output.read_text())
    assert list(report["models"]) == ["a", "b"]
    assert report["models"]["b"]["sets"]["qa"]["summary"]["loss"]["shift"]["value"] == 0
    assert report["data"]["qa"]["documents"] == len(TEXTS)
    assert output.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("suffix", [".json", ".png"])
@pytest.mark.parametrize("verb", ["tokens", "embeddings", "perplexity"])
def test_what_is_there_is_not_replaced_unasked(verb, suffix, text, call, tmp_path):
    model = () if verb == "tokens" else ("--checkpoint", "a")
    old = (tmp_path / "out").with_suffix(suffix)
    old.write_text("old")
    too_late = {"a": AssertionError("too late")}
    with pytest.raises(ConfigError, match=f"out{suffix} exists: give --overwrite"):
        call(verb, *model, *text, "--output", tmp_path / "out.json", broken=too_late)
    assert old.read_text() == "old"


@pytest.mark.parametrize("verb", ["tokens", "perplexity"])
def test_overwrite_replaces_and_the_last_line_names_the_files(verb, text, call, tmp_path, capsys):
    model = () if verb == "tokens" else ("--checkpoint", "a", "b")
    output, picture = tmp_path / "out.json", tmp_path / "out.png"
    for path in (output, picture):
        path.write_text("old")
    call(verb, *model, *text, "--output", output, "--overwrite")
    assert json.loads(output.read_text())["verb"] == verb
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert capsys.readouterr().out.splitlines()[-1] == f"{output}, {picture}"


def test_settings_of_features_that_are_off_are_left_out():
    args = Namespace(lr=0.1, chat_epochs=2, chat_data_path=None, forget_weight=0.01)
    assert record_run(Namespace(args=args))["settings"] == {"lr": 0.1}
    args.chat_data_path = ["chat.jsonl"]
    found = record_run(Namespace(args=args))["settings"]
    assert found == {"lr": 0.1, "chat_data_path": ["chat.jsonl"], "chat_epochs": 2}


def test_the_tokenizer_is_the_one_recorded_with_the_model(tmp_path):
    def chosen(saved, **given):
        flags = {"tokenizer_type": None, "tokenizer_model": None} | given
        checkpoint = Namespace(args=Namespace(**saved), directory=tmp_path, path="it")
        return choose_tokenizer(Namespace(**flags), checkpoint)

    saved = {"tokenizer_type": "SentencePieceTokenizer", "tokenizer_model": "t.model"}
    assert chosen(saved) == ("SentencePieceTokenizer", "t.model")
    assert chosen(saved, tokenizer_model="u") == ("SentencePieceTokenizer", "u")
    assert chosen(saved, tokenizer_type="HuggingFaceTokenizer")[0] == "HuggingFaceTokenizer"
    with pytest.raises(ConfigError, match="--tokenizer-model: expected a tokenizer, it names none"):
        chosen({"tokenizer_type": None, "tokenizer_model": None})
    (tmp_path / "huggingface").mkdir()
    assert chosen(saved) == ("HuggingFaceTokenizer", str(tmp_path / "huggingface"))
