"""A tokenizer that is not there is refused by its flag, without asking the hub for a minute."""

from argparse import Namespace
from pathlib import Path

import huggingface_hub
import pytest
from transformers import AutoTokenizer

from megatron_ext.checkpoint.inspect import Checkpoint
from megatron_ext.conversion.to_huggingface import _kept
from megatron_ext.data.checks import check_tokenizer_place
from megatron_ext.data.tokenizers import TokenizerSpec, build_reference, tokenizer_digest
from megatron_ext.exceptions import ConfigError
from megatron_ext.preflight.files import tokenizer_facts

EXPECTED = (
    "--tokenizer-model: expected a folder with a tokenizer, or a name on the Hugging Face hub (OWNER/NAME), "
    "found no folder "
)


def huggingface(model):
    return TokenizerSpec(tokenizer_type="HuggingFaceTokenizer", tokenizer_model=model)


@pytest.fixture
def asked(monkeypatch):
    """The names that the hub was asked for, which has none of them."""
    names = []

    def load(name, **_):
        names.append(name)
        raise OSError("no connection")

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", load)
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_: None)
    return names


@pytest.mark.parametrize(
    "model",
    [
        *("no-such-model", "/no/such", "/none", "./none/tok", "../tok", "~/tok", "a/b/c", "a b"),
        *("tok/tokenizer.json", "tok/tok.model", "tok.model", "tok/"),
    ],
)
def test_what_cannot_be_on_the_hub_is_not_looked_for_there(model, asked):
    spec = huggingface(model)
    for look in (build_reference, tokenizer_digest):
        with pytest.raises(ConfigError) as refused:
            look(spec)
        assert str(refused.value) == EXPECTED + model
    assert tokenizer_facts(spec)["error"].endswith(f"found no folder {model}")
    assert not asked


def test_a_name_of_an_owner_may_be_fetched(asked):
    with pytest.raises(ConfigError) as refused:
        build_reference(huggingface("owner/model-2.5"))
    assert str(refused.value) == f"{EXPECTED}owner/model-2.5, and of the hub: no connection"
    assert asked == ["owner/model-2.5"]


def test_a_name_that_was_fetched_before_needs_no_owner(asked, monkeypatch):
    def cached(name, file):
        return "/cache/tokenizer.json" if (name, file) == ("gpt2", "tokenizer.json") else None

    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", cached)
    for model in ("gpt2", "gpt3"):
        with pytest.raises(ConfigError):
            build_reference(huggingface(model))
    assert asked == ["gpt2"]


@pytest.mark.parametrize(
    ("kind", "model", "message"),
    [
        ("HuggingFaceTokenizer", "none", f"{EXPECTED}none"),
        ("SentencePieceTokenizer", "none.model", "--tokenizer-model none.model: no such file"),
        ("NullTokenizer", "500", None),
        ("HuggingFaceTokenizer", None, None),
    ],
)
def test_a_run_looks_before_megatron_does(kind, model, message, asked):
    args = Namespace(tokenizer_type=kind, tokenizer_model=model)
    args.use_checkpoint_args, args.use_tokenizer_model_from_checkpoint_args = False, True
    if message is None:
        check_tokenizer_place(args)
    else:
        with pytest.raises(ConfigError) as refused:
            check_tokenizer_place(args)
        assert str(refused.value) == message
    assert not asked
    args.use_checkpoint_args = True  # then the checkpoint names it
    check_tokenizer_place(args)


def test_an_export_takes_no_name_of_the_hub(tmp_path):
    checkpoint = Checkpoint(tmp_path, 5, tmp_path / "iter_0000005", Namespace())
    with pytest.raises(ConfigError, match=r"^--tokenizer: expected the folder .* at owner/none$"):
        _kept(checkpoint, Path("owner/none"), made=tmp_path)
