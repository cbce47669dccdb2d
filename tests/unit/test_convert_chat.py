"""A chat-tuned model is exported with the template and the end of turn that it was tuned with."""

import json

import pytest
from transformers import AutoTokenizer

from megatron_ext.conversion import from_huggingface
from megatron_ext.conversion.to_huggingface import export_model
from megatron_ext.exceptions import ConfigError
from tests.helpers import llama

BASE = llama.CHAT_TEMPLATE
TUNED = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
END = llama.TOKENS


@pytest.fixture
def source(tmp_path):
    folder = llama.save(tmp_path / "source", vocab_size=END + 1)
    tokenizer = llama.tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|end|>"]})
    tokenizer.save_pretrained(folder)
    return folder


def exported(source, monkeypatch, **run):
    """Folder that comes of a checkpoint of a run with these arguments."""
    made = from_huggingface._arguments

    def arguments(flags):
        args = made(flags)
        vars(args).update(run)
        return args

    monkeypatch.setattr(from_huggingface, "_arguments", arguments)
    checkpoint, folder = source.parent / "megatron", source.parent / "back"
    from_huggingface.import_model(source, checkpoint)
    export_model(checkpoint, folder)
    return folder


@pytest.mark.parametrize("stored", [True, False])
def test_template_and_end_of_turn_of_the_tuning(source, monkeypatch, stored):
    settings = source / "generation_config.json"
    if stored:  # as some models have it; `transformers` would not save it
        settings.write_text(json.dumps({"eos_token_id": 1, "do_sample": False, "top_p": 0.5}))
    else:
        settings.unlink()
    folder = exported(source, monkeypatch, tuned_chat_template=TUNED)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.chat_template == TUNED
    found = json.loads((folder / "generation_config.json").read_text())
    assert found["eos_token_id"] == [1, END]
    assert (found.get("top_p") == 0.5) == stored


@pytest.mark.parametrize("run", [{}, {"tuned_chat_template": BASE}])
def test_what_the_model_brought_stays_where_it_is_right(source, monkeypatch, run):
    folder = exported(source, monkeypatch, **run)
    for file in source.iterdir():
        if file.suffix != ".safetensors":
            assert (folder / file.name).read_bytes() == file.read_bytes(), file.name


def test_a_template_for_another_tokenizer_is_refused_before_weights_are_written(
    source, monkeypatch
):
    with pytest.raises(ConfigError, match=r"--chat-template: expected .* special token"):
        exported(source, monkeypatch, tuned_chat_template=TUNED.replace("<|end|>", "."))
    assert not (source.parent / "back").exists()
