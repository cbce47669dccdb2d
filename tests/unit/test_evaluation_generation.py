"""Choosing tokens, keeping what is finished, and the order of a long run; without a model."""

import json
import logging
import math

import pytest
import torch
from tokenizers import processors

from megatron_ext.checkpoint.own_tokenizer import tokenizer_spec
from megatron_ext.data.tokenizers import TokenizerSpec
from megatron_ext.evaluation.completion import Codec, complete_all
from megatron_ext.evaluation.journal import Journal, kept_from_before
from megatron_ext.evaluation.records import (
    read_prompts,
    read_records,
    requests_of,
    write_records,
)
from megatron_ext.evaluation.sampling import Chooser, Request, Sampling, room_for_prompt, sample
from megatron_ext.exceptions import ConfigError, DataError
from tests.helpers import llama
from tests.helpers.text import train_sentencepiece

GRID = 20_000


@pytest.mark.parametrize(
    ("temperature", "top_p"), [(1.0, 1.0), (0.5, 0.7), (2.0, 0.9), (1.0, 1e-9)]
)
def test_sampled_shares_are_those_of_the_nucleus(temperature, top_p):
    torch.manual_seed(0)
    logits = 2 * torch.randn(12)
    weights = [float(w) for w in (logits.double() / temperature).exp()]
    ranked = sorted(range(12), key=lambda i: -weights[i])
    kept, mass = [], 0.0
    for token in ranked:  # until together they have the probability
        kept.append(token)
        mass += weights[token] / sum(weights)
        if mass >= top_p:
            break
    uniform = (torch.arange(GRID, dtype=torch.float64)[:, None] + 0.5) / GRID
    column = torch.ones_like(uniform)
    chosen = sample(
        logits.expand(GRID, -1),
        temperature=temperature * column,
        top_p=top_p * column,
        uniform=uniform,
    )
    shares = torch.bincount(chosen, minlength=12).double() / GRID
    for token in range(12):
        share = weights[token] / sum(weights[i] for i in kept) if token in kept else 0.0
        assert float(shares[token]) == pytest.approx(share, abs=2 / GRID)


def request(key: str, length: int, **changes) -> Request:
    sampling = Sampling(**{"max_new_tokens": 4, "temperature": 1.0} | changes)
    return Request(key=key, tokens=list(range(length)), sampling=sampling, stop=frozenset([2]))


def test_random_numbers_belong_to_the_request_and_not_to_its_row():
    torch.manual_seed(0)
    logits = torch.randn(1, 50).expand(3, -1)
    together = Chooser([request(key, 1) for key in "abc"], vocab_size=50)
    draws = torch.stack([together(logits, rows=range(3)) for _ in range(8)])
    assert not torch.equal(draws[:, 0], draws[:, 1])
    late = Chooser([request(key, 1) for key in "cab"], vocab_size=50)
    late(logits, rows=[1, 2])  # the first row has not begun
    again = torch.stack([late(logits, rows=[0]) for _ in range(8)])
    assert torch.equal(again[:, 0], draws[:, 2])


def test_padding_of_the_vocabulary_is_never_chosen():
    logits = torch.zeros(2, 8)
    logits[:, 6:] = 100.0
    chooser = Chooser([request("a", 1, temperature=0.0), request("b", 1)], vocab_size=6)
    assert max(int(chooser(logits, rows=[0, 1]).max()) for _ in range(20)) < 6


class Echo:
    """Answers with the length of each prompt and the end of the document."""

    is_writer, batch_size, context_length, identity = True, 2, 7, "echo"

    def __init__(self):
        self.seen = []

    def agree(self, value):
        return value

    def complete(self, requests):
        self.seen.append([r.key for r in requests])
        if len(self.seen) == self.fail_at:
            raise KeyboardInterrupt
        return [[10 + len(r.tokens), 2] for r in requests]

    fail_at = None


@pytest.fixture(scope="module")
def codec(tmp_path_factory):
    path = train_sentencepiece(tmp_path_factory.mktemp("tokenizer") / "t.model")
    return Codec(TokenizerSpec(tokenizer_type="SentencePieceTokenizer", tokenizer_model=path))


def test_an_interrupted_run_goes_on(tmp_path, codec, caplog):
    caplog.set_level(logging.INFO)
    requests = [request(str(n), n) for n in (1, 5, 3, 6, 2, 9)]
    output = tmp_path / "out"
    echo = Echo()
    echo.fail_at = 2
    with (
        pytest.raises(
            KeyboardInterrupt, match=r"^2 of 6 are in .*out\.progress, the same command "
        ),
        Journal(output, settings={"a": 1}) as journal,
    ):
        complete_all(echo, codec, requests, journal=journal, title="")
    assert "were found" not in caplog.text
    assert echo.seen == [["6", "5"], ["3", "2"]]
    with (tmp_path / "out.progress").open("a") as file:
        file.write('{"key": "3", "val')  # cut off by a kill
    echo = Echo()
    with Journal(output, settings={"a": 1}) as journal:
        done = complete_all(echo, codec, requests, journal=journal, title="")
        assert echo.seen == [["3", "2"], ["1"]]
        assert f"2 of 6 were found in {journal.path}" in caplog.messages
        with pytest.raises(DataError, match="another run"):
            Journal(output, settings={"a": 1})
    assert set(done) == {"1", "2", "3", "5", "6", "9"}
    assert [(done[k].finish, done[k].tokens) for k in "169"] == [
        ("stop", 2),
        ("stop", 2),
        ("no room", 0),
    ]
    with pytest.raises(ConfigError, match="settings"):
        Journal(output, settings={"a": 2})
    with Journal(output, settings={"a": 1}) as journal:
        assert len(journal) == 5
        journal.remove()
    assert not list(tmp_path.iterdir())


def test_a_damaged_journal_is_named_with_the_line(tmp_path):
    with Journal(tmp_path / "out", settings={}) as journal:
        journal.add("1", [1])
        journal.add("2", [2])
    lines = journal.path.read_bytes().splitlines(keepends=True)
    damaged = b"".join([*lines[:1], b"\0" * 9 + b"\n", *lines[2:]])
    journal.path.write_bytes(damaged)
    with pytest.raises(DataError, match=r"out\.progress, line 2: expected a result"):
        Journal(tmp_path / "out", settings={})
    assert journal.path.read_bytes() == damaged


def test_a_start_that_is_interrupted_says_what_an_earlier_one_left(tmp_path):
    output = tmp_path / "out"
    for message in ("^$", r"^.*out\.progress is kept, the same command goes on from there$"):
        with pytest.raises(KeyboardInterrupt, match=message), kept_from_before(output):
            raise KeyboardInterrupt
        (tmp_path / "out.progress").touch()
    with pytest.raises(KeyboardInterrupt, match=r"^2 of 6$"), kept_from_before(output):
        raise KeyboardInterrupt("2 of 6")


def test_prompts_and_conversations_become_tokens(codec, caplog):
    sampling = Sampling()
    assert codec.prompt("1", "", sampling).tokens == [codec.eod]
    assert "--chat-template" not in caplog.text
    chat = codec.chat("1", [{"role": "user", "content": "the fox"}], sampling)
    assert codec.eod in chat.stop
    found = codec.completion(chat, [*codec.prompt("", "the fox", sampling).tokens, codec.eod])
    assert (found.text, found.finish) == ("the fox", "stop")
    codec.chat("2", [{"role": "user", "content": "the dog"}], sampling)
    # This model was never tuned on conversations; once is enough.
    assert caplog.text.count("--chat-template: none is given and none is stored") == 1


@pytest.mark.parametrize("single", ["<s> $A", "<s> $A </s>"])
def test_a_document_begins_with_its_token_and_a_continuation_does_not(tmp_path, single):
    """No text ends with the token that ends a document: the model would go on behind that."""
    fast = llama.tokenizer()
    fast.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=single, special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    fast.save_pretrained(tmp_path)
    codec = Codec(tokenizer_spec(tmp_path))
    begun, continued = codec.encode("the License"), codec.encode("the License", special=False)
    assert begun == [0, *continued]
    assert codec.decode(begun) == "the License"
    assert codec.encode("") == [0]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", r":2: expected JSON"),
        ("[1]", r":2: expected an object, found list"),
        (r'{"prompt": "\ud800"}', r":2: expected valid Unicode"),
        ('{"text": "x"}', r"record 2: .*found keys \['text'\]"),
        ('{"messages": []}', r"record 2: expected a list of turns, found '\[\]'"),
        ('{"messages": "hi"}', r"record 2: expected a list of turns, found"),
        (
            '{"messages": [{"role": "user"}]}',
            r"""record 2: expected turn 1 with "role" and "content", found '{"role": "user"}'""",
        ),
        (
            '{"messages": [{"role": "user", "content": "a"}, {"role": "tool", "content": "b"}]}',
            r"""record 2: expected "role" of turn 2 to be one of system, user, assistant, found 'tool'""",
        ),
        (
            '{"messages": [{"role": "assistant", "content": "a"}]}',
            "record 2: expected the assistant to answer turn 1, the last, found its own turn",
        ),
        ('{"messages": [{"role": "system", "content": null}]}', "of turn 1, found NoneType"),
        ('{"prompt": 3}', "record 2"),
    ],
)
def test_bad_prompts_are_named(tmp_path, line, message):
    path = tmp_path / "prompts.jsonl"
    path.write_text(json.dumps({"prompt": "fine"}) + "\n" + line + "\n")
    with pytest.raises(DataError, match=message):
        read_prompts(path)


def test_a_system_turn_may_be_empty(tmp_path):
    """Templates tell it from none, for which some put in one of their own."""
    turns = [{"role": "system", "content": ""}, {"role": "user", "content": "a"}]
    write_records(tmp_path / "prompts.jsonl", [{"messages": turns}], overwrite=False)
    assert read_prompts(tmp_path / "prompts.jsonl") == [{"messages": turns}]


def test_lines_end_at_newlines_alone(tmp_path):
    records = [{"completion": "one\u2028two\x85three\nfour"}, {"completion": ""}]
    write_records(tmp_path / "out.jsonl", records, overwrite=False)
    assert read_records(tmp_path / "out.jsonl") == records


def test_a_prompt_of_null_is_none(tmp_path, codec):
    messages = [{"role": "user", "content": "the fox"}]
    path = tmp_path / "prompts.jsonl"
    path.write_text(json.dumps({"prompt": None, "messages": messages}) + "\n")
    (found,) = requests_of(read_prompts(path), codec, Sampling())
    assert found == codec.chat("1", messages, Sampling())


@pytest.mark.parametrize(
    "change", [{"temperature": -1}, {"top_p": 0}, {"top_p": 1.1}, {"max_new_tokens": 0}]
)
def test_numbers_out_of_range_are_refused(change):
    flag = "--" + next(iter(change)).replace("_", "-")
    with pytest.raises(ConfigError, match=flag):
        Sampling(**change)


@pytest.mark.parametrize("temperature", [-1.0, math.nan, math.inf])
def test_temperatures_that_are_none_are_refused(temperature):
    with pytest.raises(ConfigError, match=r"--temperature: expected 0 or more, found "):
        Sampling(temperature=temperature)


@pytest.mark.parametrize(
    ("tokens", "new", "room"),
    [(300, 100, 924), (1000, 100, 924), (300, 1280, 300), (900, 1280, 512), (600, 800, 512)],
)
def test_a_prompt_keeps_half_of_the_context_at_least(tokens, new, room):
    assert room_for_prompt(tokens, new=new, context=1024) == room
