"""What the model learns to write is the assistant's text and the end of its turn, token for token."""

import pytest
import sentencepiece
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from megatron_ext.data.chat_template import BUILT_IN, ChatTemplate, load_template
from megatron_ext.data.tokenizers import TokenizerSpec
from megatron_ext.data.train_tokenizer import TrainTokenizerConfig, train_tokenizer
from megatron_ext.exceptions import ConfigError, DataError
from tests.helpers.conversations import conversations, write_jsonl

# In this text the end of every prompt and the start of every answer are one word.
TEXT = "User: how are you? Assistant:fine thanks Assistant:four User: two and two? " * 40
TURNS = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "how are you?"},
    {"role": "assistant", "content": "fine thanks"},
    {"role": "user", "content": "two and two?"},
    {"role": "assistant", "content": "four"},
]
CHATML = (
    "{% for message in messages %}"
    "<|im_start|>{{ message['role'] }}\n{{ message['content'] | trim }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# A prompt and an answer with nothing between them that a tokenizer would stop at.
GLUED = (
    "{{ bos_token }}{% for m in messages %}{{ m['role'] }}:{{ m['content'] }}{{ eos_token }}"
    "{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
)


@pytest.fixture(scope="module")
def sentencepiece_spec(tmp_path_factory):
    directory = tmp_path_factory.mktemp("sentencepiece")
    source = write_jsonl(directory / "text.jsonl", [{"text": TEXT}])
    model = directory / "tokenizer.model"
    config = TrainTokenizerConfig(inputs=[str(source)], vocab_size=340, output=str(model))
    train_tokenizer(config)
    return TokenizerSpec(tokenizer_type="SentencePieceTokenizer", tokenizer_model=str(model))


@pytest.fixture(scope="module")
def huggingface_spec(tmp_path_factory):
    """A byte-level BPE whose merges cross from a prompt into an answer."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["assistant:four", "assistant\nfour", TEXT[:80]] * 20, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=special[2:],
    )
    fast.chat_template = CHATML
    directory = tmp_path_factory.mktemp("huggingface")
    fast.save_pretrained(directory)
    return TokenizerSpec(tokenizer_type="HuggingFaceTokenizer", tokenizer_model=str(directory))


def pieces(spec, ids):
    """Each token as text."""
    if spec.tokenizer_type == "HuggingFaceTokenizer":
        tokenizer = PreTrainedTokenizerFast.from_pretrained(spec.tokenizer_model)
        return [tokenizer.decode([token]) for token in ids]
    processor = sentencepiece.SentencePieceProcessor(model_file=spec.tokenizer_model)
    found = [processor.id_to_piece(token).replace("\u2581", " ") for token in ids]
    return [chr(int(p[3:5], 16)) if p.startswith("<0x") else p for p in found]


def spans(spec, template, turns, **options):
    """The text of each run of tokens that count, and of each that does not."""
    ids, mask = template.encode(turns, **options)
    found = []
    for piece, counts in zip(pieces(spec, ids), mask, strict=True):
        if not found or found[-1][0] != counts:
            found.append((counts, ""))
        found[-1] = (counts, found[-1][1] + piece)
    return found


@pytest.mark.parametrize("begins", [False, True])
def test_the_built_in_template_begins_as_the_tokenizer_begins_texts(
    begins, huggingface_spec, tmp_path
):
    fast = PreTrainedTokenizerFast.from_pretrained(huggingface_spec.tokenizer_model)
    fast.chat_template = None
    if begins:
        fast.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 0)]
        )
    fast.save_pretrained(tmp_path)
    spec = TokenizerSpec(tokenizer_type="HuggingFaceTokenizer", tokenizer_model=str(tmp_path))
    template = load_template(spec)
    assert template.is_built_in
    ids, mask = template.encode(TURNS)
    assert (ids[0] == fast.bos_token_id, mask[0]) == (begins, 0)
    assert ids.count(fast.bos_token_id) == begins
    prompt, _ = template.encode(TURNS[:2], add_generation_prompt=True)
    assert prompt == ids[: len(prompt)]
    assert not load_template(huggingface_spec).is_built_in


def test_the_built_in_template_counts_answers_and_their_ends(sentencepiece_spec):
    template = load_template(sentencepiece_spec)
    assert template.source == BUILT_IN
    ids, mask = template.encode(TURNS)
    print(*zip(pieces(sentencepiece_spec, ids), mask, strict=True))  # shown if it fails
    assert spans(sentencepiece_spec, template, TURNS) == [
        (0, "System: Be kind.</s>User: how are you?</s>Assistant:"),
        (1, "fine thanks</s>"),
        (0, "User: two and two?</s>Assistant:"),
        (1, "four</s>"),
    ]
    assert template.render(TURNS[1:3]) == "User: how are you?</s>Assistant:fine thanks</s>"


def test_every_token_has_its_own_mask(sentencepiece_spec):
    template = load_template(sentencepiece_spec)
    turns = [{"role": "user", "content": "xyz"}, {"role": "assistant", "content": "qqq"}]
    ids, mask = template.encode(turns)
    found = pieces(sentencepiece_spec, ids)
    # Letters that the text does not have are bytes.
    assert found[-4:] == ["q", "q", "q", "</s>"]
    assert mask == [0] * (len(ids) - 4) + [1] * 4
    assert ids.count(template.eod_id) == 2
    assert mask[ids.index(template.eod_id)] == 0


def test_the_tokenizers_own_template_counts_no_newline_behind_the_turn(huggingface_spec):
    template = load_template(huggingface_spec)
    assert template.source == CHATML
    assert spans(huggingface_spec, template, TURNS[1:]) == [
        (0, "<|im_start|>user\nhow are you?<|im_end|>\n<|im_start|>assistant\n"),
        (1, "fine thanks<|im_end|>"),
        (0, "\n<|im_start|>user\ntwo and two?<|im_end|>\n<|im_start|>assistant\n"),
        (1, "four<|im_end|>"),
        (0, "\n"),
    ]


# What templates take for granted: that there are no tools, the filter, the tag, and all special tokens.
DETAILS = (
    "{{ bos_token }}{% if tools is not none or documents is not none %}tools{% endif %}"
    "{% for m in messages %}{% if m['role'] == 'assistant' %}\n"
    "    {% generation %}\n{{ m['content'] }}{{ eos_token }}{% endgeneration %}\n"
    "{% else %}{{ m['content'] | tojson }}{{ unk_token }}{% endif %}{% endfor %}"
)


@pytest.mark.parametrize("source", [BUILT_IN, CHATML, GLUED, DETAILS])
def test_rendered_text_is_that_of_transformers(huggingface_spec, source):
    tokenizer = PreTrainedTokenizerFast.from_pretrained(huggingface_spec.tokenizer_model)
    template = ChatTemplate(source, huggingface_spec)
    quoted = [{"role": "user", "content": "'and' <two> & \u00e9"}]
    for turns, prompt in ((TURNS, False), (TURNS[:2], True), (TURNS[:4], True), (quoted, True)):
        expected = tokenizer.apply_chat_template(
            turns, chat_template=source, tokenize=False, add_generation_prompt=prompt
        )
        assert template.render(turns, add_generation_prompt=prompt) == expected
    # The first prompt is one segment: its tokens are those of any engine.
    expected = tokenizer(template.render(TURNS[:2], add_generation_prompt=True)).input_ids
    assert template.encode(TURNS[:2], add_generation_prompt=True)[0] == expected


def test_a_merge_across_the_boundary_does_not_move_it(huggingface_spec):
    template = ChatTemplate(GLUED, huggingface_spec)
    turns = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "four"}]
    tokenizer = PreTrainedTokenizerFast.from_pretrained(huggingface_spec.tokenizer_model)
    whole = [tokenizer.decode([t]) for t in tokenizer(template.render(turns)).input_ids]
    # Tokenised in one piece there is no boundary: one token has the prompt's end and the answer's start.
    assert any(piece.endswith("four") and ":" in piece for piece in whole), whole
    assert spans(huggingface_spec, template, turns) == [
        (0, "<s>user:x</s>assistant:"),
        (1, "four</s>"),
    ]


@pytest.mark.parametrize("kind", ["sentencepiece", "huggingface", "glued"])
def test_a_prompt_has_at_inference_the_tokens_of_training(
    kind, sentencepiece_spec, huggingface_spec
):
    template = {
        "sentencepiece": lambda: load_template(sentencepiece_spec),
        "huggingface": lambda: load_template(huggingface_spec),
        "glued": lambda: ChatTemplate(GLUED, huggingface_spec),
    }[kind]()
    for turns in (TURNS, *conversations(30, seed=3)):
        ids, mask = template.encode(turns)
        answers = 0
        for index, turn in enumerate(turns):
            if turn["role"] == "assistant":
                prompt, _ = template.encode(turns[:index], add_generation_prompt=True)
                assert ids[: len(prompt)] == prompt
                assert mask[len(prompt) - 1 : len(prompt) + 1] == [0, 1]
                answers += 1
        assert answers == sum(later > now for now, later in zip([0, *mask], mask, strict=False))


def test_the_token_that_ends_an_answer(sentencepiece_spec, huggingface_spec):
    built_in = ChatTemplate(BUILT_IN, sentencepiece_spec)
    assert built_in.end_of_turn == built_in.eod_id
    # What follows it in the text of the turn, a newline here, is no part of the answer.
    tokenizer = PreTrainedTokenizerFast.from_pretrained(huggingface_spec.tokenizer_model)
    chatml = load_template(huggingface_spec)
    assert chatml.end_of_turn == tokenizer.convert_tokens_to_ids("<|im_end|>") != chatml.eod_id


@pytest.mark.parametrize("text", ["</s>", "\ufdd0eos\ufdd1"])
def test_sentencepiece_text_cannot_forge_the_end_of_a_turn(sentencepiece_spec, text):
    template = load_template(sentencepiece_spec)
    turns = [{"role": "user", "content": f"a{text}b"}, {"role": "assistant", "content": "c"}]
    if text == "</s>":
        ids, _ = template.encode(turns)
        assert ids.count(template.eod_id) == 2
    else:
        with pytest.raises(DataError, match="no special token in the text of turn 1"):
            template.encode(turns)


def test_huggingface_text_cannot_forge_the_end_of_a_turn(huggingface_spec):
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b<|im_end|>c"}]
    with pytest.raises(DataError, match=r"no special token in the text of turn 2, found '<|im_end"):
        load_template(huggingface_spec).encode(turns)


BAD = {
    "{{ messages": "unexpected end of template",
    "{{ raise_exception('no') }}": "no",
    "{% for m in messages %}{{ m['content'] }}{% endfor %}": "special token",
    "{% for m in messages %}{{ m['content'] | upper }}{{ eos_token }}{% endfor %}": "as it is",
    "{% for m in messages %}{% if loop.last or m['role'] == 'user' %}{{ m['content'] }}{% endif %}"
    "{{ eos_token }}{% endfor %}": "rewrites earlier turns",
    "{{ strftime_now('%Y') }}": "strftime_now",
}


@pytest.mark.parametrize("source", BAD)
def test_a_template_that_cannot_be_masked_is_refused(sentencepiece_spec, source):
    with pytest.raises(ConfigError, match=f"--chat-template: .*{BAD[source]}"):
        ChatTemplate(source, sentencepiece_spec).check_tuning()


def test_the_answer_may_occur_in_the_template_itself(huggingface_spec):
    source = CHATML.replace("\n{{ m", "\n<|im_start|>final\n{{ m").replace(
        "assistant\n{% endif", "assistant\n<|im_start|>final\n{% endif"
    )
    template = ChatTemplate(source, huggingface_spec)
    for answer in ("final", "im_end", "assistant"):
        turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": answer}]
        assert (1, f"{answer}<|im_end|>") in spans(huggingface_spec, template, turns)


def test_the_answer_may_occur_in_what_its_turn_begins_with(huggingface_spec):
    """And may begin like the last letter of a token there: its end is that of its last place."""
    template = ChatTemplate(CHATML.replace("\n{{ m", "\nfinal<|im_start|>{{ m"), huggingface_spec)
    for answer in ("final", ">>", "four"):
        turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": answer}]
        expected = (1, f"final<|im_start|>{answer}<|im_end|>")
        assert expected in spans(huggingface_spec, template, turns)


def test_the_answer_may_occur_in_the_tokens_that_end_a_turn(huggingface_spec):
    """Only the first of them is the model's to write, whatever the answer."""
    template = ChatTemplate(CHATML.replace("<|im_end|>", "<|im_end|></s>"), huggingface_spec)
    for answer in ("end", "four", "s"):
        turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": answer}]
        assert (1, f"{answer}<|im_end|>") in spans(huggingface_spec, template, turns)


def test_an_answer_may_be_empty(sentencepiece_spec, huggingface_spec):
    """As a model's own may be in a conversation that goes on."""
    for spec, end in ((sentencepiece_spec, "</s>"), (huggingface_spec, "<|im_end|>")):
        for empty in ("", " \n"):
            turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": empty}]
            found = spans(spec, load_template(spec), [*turns, *TURNS[1:3]])
            assert [text.strip() for written, text in found if written] == [
                end,
                f"fine thanks{end}",
            ]


def test_a_file_or_a_run_gives_the_template(tmp_path, sentencepiece_spec):
    (tmp_path / "chat_template.jinja").write_text(GLUED)
    for path in (tmp_path, tmp_path / "chat_template.jinja"):
        assert load_template(sentencepiece_spec, path=path).source == GLUED
    with pytest.raises(ConfigError, match=r"--chat-template: .*no_such"):
        load_template(sentencepiece_spec, path=tmp_path / "no_such")
