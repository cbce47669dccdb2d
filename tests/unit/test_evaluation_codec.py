"""Where a model's text ends, and turns in which it wrote nothing."""

import json

import pytest

from megatron_ext.checkpoint.own_tokenizer import tokenizer_spec
from megatron_ext.data.tokenizers import TokenizerSpec
from megatron_ext.evaluation.answers import model_settings
from megatron_ext.evaluation.completion import Codec
from megatron_ext.evaluation.mtbench import Question, requests
from megatron_ext.evaluation.mtbench_run import _two_turns
from megatron_ext.evaluation.sampling import Sampling
from megatron_ext.exceptions import ConfigError, DataError
from tests.helpers import llama
from tests.helpers.text import train_sentencepiece

# As chat models have it: what ends a turn is not what ends a document.
CHATML = (
    "{% for m in messages %}<s>{{ m.role }}\n{{ m.content | trim }}<|endoftext|>\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)


@pytest.fixture
def folder(tmp_path):
    """A tokenizer whose `</s>` is 1 and `<|endoftext|>` 2, without files of a model."""
    tokenizer = llama.tokenizer()
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(tmp_path)
    return tmp_path


def declare(folder, **files):
    for name, tokens in files.items():
        (folder / f"{name}.json").write_text(json.dumps({"eos_token_id": tokens}))


@pytest.mark.parametrize(
    ("files", "text", "chat"),
    [
        ({}, {1}, {1, 2}),
        ({"generation_config": [1, 7]}, {1, 7}, {1, 2, 7}),
        ({"generation_config": 7}, {1, 7}, {1, 2, 7}),
        ({"generation_config": [2, 1]}, {1, 2}, {1, 2}),
        ({"config": [7, 8, 9]}, {1, 7, 8, 9}, {1, 2, 7, 8, 9}),
        ({"config": [8], "generation_config": [7]}, {1, 7}, {1, 2, 7}),
        ({"config": 8, "generation_config": None}, {1, 8}, {1, 2, 8}),
        ({"generation_config": [llama.TOKENS - 1, llama.TOKENS, -1]}, {1, 499}, {1, 2, 499}),
    ],
)
def test_what_the_models_files_call_an_end_is_one(folder, files, text, chat):
    """An instruction-tuned model ends a document as in pretraining, a turn in its own way."""
    declare(folder, **files)
    codec = Codec(tokenizer_spec(folder))
    assert codec.prompt("1", "the", Sampling()).stop == text
    messages = [{"role": "user", "content": "the"}]
    request = codec.chat("1", messages, Sampling())
    assert request.stop == chat
    for token in chat:
        assert codec.completion(request, [50, token]).finish == "stop"


def test_settings_of_answers_tell_them_where_tokenizer_and_template_do_not(folder):
    class Model:
        identity = "model"

    assert set(model_settings(Model, Codec(tokenizer_spec(folder)))) == {
        "model", "tokenizer_model", "chat_template",
    }  # fmt: skip
    declare(folder, generation_config=[9, 1, 7, 2])
    assert model_settings(Model, Codec(tokenizer_spec(folder)))["eos_token_id"] == [7, 9]


def test_a_tokenizer_that_is_a_file_has_none_beside_it(tmp_path):
    path = train_sentencepiece(tmp_path / "t.model")
    declare(tmp_path, generation_config=[7])
    spec = TokenizerSpec(tokenizer_type="SentencePieceTokenizer", tokenizer_model=str(path))
    codec = Codec(spec)
    assert codec.stops(chat=False) == {codec.eod}


@pytest.mark.parametrize("content", ["{", '{"eos_token_id": "</s>"}', '{"eos_token_id": [true]}'])
def test_files_that_name_no_tokens_are_refused(folder, content):
    (folder / "generation_config.json").write_text(content)
    with pytest.raises(ConfigError, match=r"generation_config\.json: .*expected "):
        Codec(tokenizer_spec(folder))


class Silent:
    """A model that ends its first answer at once, or after spaces, and answers the second question."""

    is_writer, batch_size, context_length, identity = True, 1, 200, "silent"

    def __init__(self, first):
        self.first, self.seen = first, []

    def agree(self, value):
        return value

    def complete(self, asked):
        self.seen += [list(request.tokens) for request in asked]
        return [self.first if request.key.endswith(" 1") else [50, 2] for request in asked]


@pytest.mark.parametrize("spaces", ["", "  "])
def test_a_question_goes_on_behind_an_empty_answer(folder, spaces):
    codec = Codec(tokenizer_spec(folder))
    model = Silent([*codec.encode(spaces), 2])
    question = Question(81, "writing", ("Write.", "Again!"))
    (found,) = _two_turns(model, codec, [question], Sampling(), None).values()
    assert found == ["", codec.decode([50]).strip()]
    assert llama.tokenizer().decode(model.seen[1]) == (
        "<s>user\nWrite.<|endoftext|>\n<s>assistant\n<|endoftext|>\n"
        "<s>user\nAgain!<|endoftext|>\n<s>assistant\n"
    )


def test_a_question_that_the_template_refuses_is_named(folder):
    refusal = "{% if messages[-1].content == 'Again!' %}{{ raise_exception('no') }}{% endif %}"
    (folder / "t.jinja").write_text(refusal + CHATML)
    codec = Codec(tokenizer_spec(folder), template=folder / "t.jinja")
    questions = [
        Question(i, "writing", ("Write.", again)) for i, again in ((80, "?"), (81, "Again!"))
    ]
    with pytest.raises(DataError, match=r"^question 81, turn 2: expected turns .* no$"):
        requests(questions, {80: ["one"], 81: ["one"]}, codec, Sampling())
