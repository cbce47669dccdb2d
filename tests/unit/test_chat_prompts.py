"""Templates that rewrite earlier turns: their models are asked, and are not tuned with them."""

import logging
from argparse import Namespace
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from megatron_ext import arguments, chat, first_rank
from megatron_ext.checkpoint.inspect import Checkpoint
from megatron_ext.checkpoint.own_tokenizer import tokenizer_spec
from megatron_ext.checkpoint.source import Start
from megatron_ext.config import ChatConfig, UnlearnConfig
from megatron_ext.data.chat_template import BUILT_IN, TEMPLATE_FILE, load_template
from megatron_ext.data.conversations import find_format
from megatron_ext.evaluation.completion import Codec
from megatron_ext.evaluation.sampling import Sampling
from megatron_ext.exceptions import ConfigError, DataError
from tests.helpers import llama
from tests.helpers.conversations import write_jsonl

# Of Qwen3 what is about tools is left out: an answer has a thought, if an empty one, only at the end.
QWEN3 = r"""
{%- if messages[0].role == 'system' %}
    {{- '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' }}
{%- endif %}
{%- set ns = namespace(searching=true, last_query_index=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- if ns.searching and message.role == "user" %}
        {%- set ns.searching = false %}
        {%- set ns.last_query_index = (messages|length - 1) - loop.index0 %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.role == "user" %}
        {{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}
    {%- elif message.role == "assistant" %}
        {%- set content = message.content %}
        {%- set thought = '' %}
        {%- if '</think>' in content %}
            {%- set thought = content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\n') %}
        {%- endif %}
        {%- if loop.index0 > ns.last_query_index and (loop.last or thought) %}
            {{- '<|im_start|>' + message.role + '\n<think>\n' + thought + '\n</think>\n\n' + content }}
        {%- else %}
            {{- '<|im_start|>' + message.role + '\n' + content }}
        {%- endif %}
        {{- '<|im_end|>\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
{%- endif %}
"""
# Of Mistral-Instruct v0.3, likewise: the system's text stands in the last question.
MISTRAL = r"""
{%- if messages[0]["role"] == "system" %}
    {%- set system_message = messages[0]["content"] %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set loop_messages = messages %}
{%- endif %}
{{- bos_token }}
{%- for message in loop_messages %}
    {%- if message["role"] == "user" %}
        {%- if loop.last and system_message is defined %}
            {{- "[INST] " + system_message + "\n\n" + message["content"] + "[/INST]" }}
        {%- else %}
            {{- "[INST] " + message["content"] + "[/INST]" }}
        {%- endif %}
    {%- elif message["role"] == "assistant" %}
        {{- " " + message["content"]|trim + eos_token }}
    {%- endif %}
{%- endfor %}
"""
SYSTEM = {"role": "system", "content": "Be kind."}
ASKED = [
    {"role": "user", "content": "the licence?"},
    {"role": "assistant", "content": "<think>\nwhich\n</think>\n\nthis work"},
    {"role": "user", "content": "and the terms?"},
]
ANSWERED = [*ASKED, {"role": "assistant", "content": "these conditions"}]
SPECIAL = ["<|im_start|>", "<|im_end|>", "[INST]", "[/INST]"]
REWRITES = "which rewrites earlier turns; --chat-template FILE names another"


@pytest.fixture(scope="module", params=["qwen3", "mistral"])
def model(request, tmp_path_factory):
    """A folder of a tokenizer with such a template, and the name of the token that ends answers."""
    source, end = {"qwen3": (QWEN3, "<|im_end|>"), "mistral": (MISTRAL, "</s>")}[request.param]
    tokenizer = llama.tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIAL})
    tokenizer.chat_template = source
    folder = tmp_path_factory.mktemp(request.param)
    tokenizer.save_pretrained(folder)
    return folder, end


def test_a_prompt_is_that_of_transformers_and_a_conversation_is_refused(model, caplog):
    folder, end = model
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    template = load_template(tokenizer_spec(folder))
    assert template.end_of_turn == tokenizer.convert_tokens_to_ids(end)
    for _ in range(2):
        for turns in ([SYSTEM, *ASKED], [SYSTEM, ASKED[0]], ASKED[:1]):
            expected = tokenizer.apply_chat_template(
                turns, tokenize=False, add_generation_prompt=True
            )
            ids, mask = template.encode(turns, add_generation_prompt=True)
            assert ids == tokenizer(expected, add_special_tokens=False).input_ids
            assert not any(mask)
    (said,) = caplog.messages
    assert said.startswith("--chat-template: the tokenizer's own rewrites earlier turns; prompts ")
    for tokenise in (template.encode, template.pieces):
        with pytest.raises(DataError, match=f"found the tokenizer's own, {REWRITES}"):
            tokenise([SYSTEM, *ANSWERED])
    with pytest.raises(DataError, match="no special token in the text of turn 1"):
        template.encode([{"role": "user", "content": f"a{end}"}], add_generation_prompt=True)


def test_a_second_question_is_asked_with_the_answer_to_the_first(model):
    folder, _ = model
    codec = Codec(tokenizer_spec(folder))
    request = codec.chat("x", [SYSTEM, *ASKED], Sampling(max_new_tokens=1))
    text = PreTrainedTokenizerFast.from_pretrained(folder).decode(request.tokens)
    assert "this work" in text
    assert codec.template.end_of_turn in request.stop


def test_tuning_is_refused_before_a_conversation_is_read(tmp_path, monkeypatch):
    file = tmp_path / "qwen3.jinja"
    file.write_text(QWEN3)
    tokenizer = llama.tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIAL})
    tokenizer.save_pretrained(tmp_path)
    spec = tokenizer_spec(tmp_path)
    data = write_jsonl(tmp_path / "chat.jsonl", [{"messages": ANSWERED}])
    refusal = f"^--chat-template: expected a chat template .*, found {file}, {REWRITES}$"
    with pytest.raises(ConfigError, match=refusal):
        find_format([Path(data)], spec, input_format="jsonl", template=file)
    monkeypatch.setattr(chat, "_check", lambda args: None)
    args = Namespace(tokenizer_type=spec.tokenizer_type, tokenizer_model=spec.tokenizer_model)
    args.tokenizer_hf_no_use_fast = args.trust_remote_code = False
    args.chat_template = file
    with pytest.raises(ConfigError, match=refusal):
        chat.chat_run(args, ChatConfig(chat_data_path=[str(tmp_path / "gone.jsonl")]))


def test_a_template_says_where_it_is_from(tmp_path):
    tokenizer = llama.tokenizer()
    tokenizer.save_pretrained(tmp_path / "own")
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path / "none")
    file = tmp_path / TEMPLATE_FILE
    file.write_text(BUILT_IN)
    own, none = (tokenizer_spec(tmp_path / name) for name in ("own", "none"))
    assert load_template(own).origin == "the tokenizer's own"
    assert load_template(none).origin == "the built-in one"
    assert load_template(own, path=tmp_path).origin == str(file)


@pytest.mark.parametrize(
    ("recorded", "ours", "flag", "rank", "said"),
    [
        ("a", "b", None, 0, "with the tokenizer's own, which is another"),
        ("a", BUILT_IN, None, 0, "with the built-in one, which is another"),
        ("a", "b", None, 1, None),
        ("a", "b", "b.jinja", 0, None),
        ("a", "a", None, 0, None),
        (None, "b", None, 0, None),
    ],
)
def test_tuning_again_with_another_template_is_told(
    recorded, ours, flag, rank, said, tmp_path, caplog, monkeypatch
):
    saved = Namespace() if recorded is None else Namespace(tuned_chat_template=recorded)
    found = Checkpoint(tmp_path, 5, tmp_path / "iter_0000005", saved)
    start = Start(found, "--pretrained-checkpoint", resumed=False)
    monkeypatch.setattr(first_rank, "find_start", lambda *_, **__: start)
    args = Namespace(tuned_chat_template=ours, chat_template=flag, rank=rank, chat_digest="x")
    args.ckpt_convert_format = args.ckpt_step = None
    caplog.set_level(logging.WARNING)
    arguments.check_checkpoints(args, UnlearnConfig())
    assert args.tuned_chat_template == ours
    assert len(caplog.messages) == (said is not None)
    if said:
        assert said in caplog.text
        assert "--chat-template FILE keeps the former" in caplog.text
        (tmp_path / TEMPLATE_FILE).write_text("a")
        arguments.check_checkpoints(args, UnlearnConfig())
        assert f"--chat-template {tmp_path / TEMPLATE_FILE} keeps" in caplog.messages[-1]
