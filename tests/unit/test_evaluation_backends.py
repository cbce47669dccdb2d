"""A model or a tokenizer that is not where it was is refused by the flag that names it now."""

from argparse import ArgumentParser, Namespace
from pathlib import Path

import pytest

from megatron_ext.checkpoint import inspect, named
from megatron_ext.checkpoint.own_tokenizer import tokenizer_spec
from megatron_ext.conversion.to_huggingface import _kept
from megatron_ext.data.chat_template import TEMPLATE_FILE
from megatron_ext.evaluation import backends
from megatron_ext.evaluation.backends import add_model_arguments, open_generator
from megatron_ext.exceptions import CheckpointError, ConfigError
from megatron_ext.runtime import compat
from tests.helpers import llama


def refused(*words):
    parser = ArgumentParser()
    add_model_arguments(parser)
    options = parser.parse_args([*map(str, words)])
    with pytest.raises((ConfigError, CheckpointError)) as found, open_generator(options):
        pass
    return str(found.value)


def test_a_checkpoint_is_no_hugging_face_folder(tmp_path):
    words = ("--backend", "huggingface", "--model", tmp_path)
    message = (
        f"--model {tmp_path}: expected a Hugging Face folder with --backend huggingface, found no "
        "config.json in it"
    )
    assert refused(*words) == message
    (tmp_path / inspect.TRACKER).write_text("5")
    hint = "; --backend megatron reads the checkpoint there"
    assert refused(*words) == message + hint
    words = ("--backend", "huggingface", "--model", tmp_path / "iter_0000005")
    assert refused(*words).endswith(hint)


def test_a_hugging_face_folder_is_no_checkpoint(tmp_path, monkeypatch):
    monkeypatch.setattr(compat, "apply", lambda: None)
    (tmp_path / "config.json").write_text("{}")
    assert refused("--model", tmp_path) == (
        f"--model {tmp_path}: expected a checkpoint directory with --backend megatron, found a Hugging Face "
        "folder; --backend huggingface reads it"
    )
    (tmp_path / inspect.TRACKER).write_text("5")
    assert "--backend huggingface" not in refused("--model", tmp_path)
    assert "--backend huggingface" not in refused("--model", tmp_path / "iter_0000005")


@pytest.mark.parametrize("name", ["", "iter_0000005"])
def test_an_iteration_has_the_chat_template_of_its_directory(tmp_path, name, monkeypatch):
    def megatron(options, template):
        raise ConfigError(f"template in {template}")

    monkeypatch.setattr(backends, "_megatron", megatron)
    assert refused("--model", tmp_path / name) == "template in None"
    (tmp_path / TEMPLATE_FILE).write_text("")
    assert refused("--model", tmp_path / name) == f"template in {tmp_path}"


@pytest.fixture
def checkpoint(tmp_path):
    args = Namespace(tokenizer_type="SentencePieceTokenizer", tokenizer_model="gone/tok.model")
    return inspect.Checkpoint(tmp_path, 5, tmp_path / "iter_0000005", args)


def test_a_tokenizer_that_was_moved_is_told_from_one_that_was_named(checkpoint, monkeypatch):
    monkeypatch.setattr(named, "open_named", lambda *_, **__: checkpoint)
    monkeypatch.setattr(compat, "apply", lambda: None)
    words = ("--model", checkpoint.directory)
    assert refused(*words) == (
        f"--tokenizer-model gone/tok.model: no such file; {checkpoint.path} records this path, and "
        "--tokenizer-model names the tokenizer at its present place"
    )
    other = refused(*words, "--tokenizer-model", "other.model")
    assert other == "--tokenizer-model other.model: no such file"


def test_a_copied_iteration_has_the_template_that_its_arguments_record(tmp_path, caplog):
    llama.tokenizer().save_pretrained(tmp_path)
    spec, recorded = tokenizer_spec(tmp_path), "{{ messages[-1].content }}</s>"
    path = tmp_path / "iter_0000005"
    tuned, plain = (
        inspect.Checkpoint(tmp_path, 5, path, Namespace(tuned_chat_template=source))
        for source in (recorded, None)
    )
    template = backends._codec(spec, None, tuned).template
    assert (template.source, template.origin) == (recorded, f"the one that {path} records")
    assert backends._codec(spec, None, plain).template.source == llama.CHAT_TEMPLATE
    (tmp_path / "given.jinja").write_text(
        "{{ messages[0].content }}</s>{{ messages[-1].content }}</s>"
    )
    found = backends._codec(spec, tmp_path / "given.jinja", tuned).template
    assert found.source.startswith("{{ messages[0]")
    assert not caplog.messages


def test_an_export_says_where_the_tokenizer_was(checkpoint):
    with pytest.raises(ConfigError) as found:
        _kept(checkpoint, None, made=Path("none"))
    assert str(found.value).endswith(
        f"gone/tok.model; {checkpoint.path} records gone/tok.model: --tokenizer names it at its "
        "present place"
    )
