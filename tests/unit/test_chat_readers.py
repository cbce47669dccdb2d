"""Four shapes of JSON lines give the same messages; a record of none is named by file and line."""

import codecs
import gzip
import json

import pytest

from megatron_ext.data.chat import Conversation, read_conversations
from megatron_ext.data.records import BadRecord
from megatron_ext.exceptions import DataError
from tests.helpers.conversations import write_jsonl

TURNS = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "你好"},
    {"role": "assistant", "content": " Hi.\n"},
]
NAMES = {"system": "system", "user": "human", "assistant": "gpt"}
FROM_VALUE = [{"from": NAMES[turn["role"]], "value": turn["content"]} for turn in TURNS]
SHAPES = {
    "role/content": TURNS,
    "role/content in conversations": {"id": 1, "conversations": TURNS},
    "messages": {"messages": TURNS, "source": "x"},
    "from/value": FROM_VALUE,
    "from/value in conversations": {"conversations": FROM_VALUE, "system_prompt": None},
}
ROLE = {"role": "user", "content": "a"}


def read(*paths):
    return list(read_conversations(paths))


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_of_turns_gives_the_same_messages(tmp_path, shape):
    path = write_jsonl(tmp_path / "a.jsonl", [SHAPES[shape]] * 2)
    assert read(path) == [Conversation(f"{path}:{line}", TURNS) for line in (1, 2)]


def test_query_and_response_are_a_user_and_an_assistant_turn(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"query": "1+1?", "response": "2", "history": []}])
    assert [found.messages for found in read(path)] == [
        [{"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "2"}]
    ]


def test_each_file_has_its_own_shape_and_may_be_compressed(tmp_path):
    plain = write_jsonl(tmp_path / "a.jsonl", [SHAPES["messages"]])
    packed = tmp_path / "b.jsonl.gz"
    packed.write_bytes(gzip.compress(json.dumps(FROM_VALUE).encode()))
    assert [found.messages for found in read(plain, packed)] == [TURNS, TURNS]


def test_an_empty_system_turn_is_left_out(tmp_path):
    empty = {"role": "system", "content": ""}
    path = write_jsonl(tmp_path / "a.jsonl", [[empty, *TURNS[1:]]])
    assert read(path)[0].messages == TURNS[1:]


BAD = {
    "other container": ({"conversations": TURNS}, 'expected {"messages": [{"role", "content"}'),
    "other turns": ({"messages": FROM_VALUE}, 'turn 1 with "role" and "content"'),
    "no turns": ({"messages": []}, 'expected {"messages"'),
    "no list": ({"messages": "hi"}, 'expected {"messages"'),
    "unknown role": ({"messages": [{"role": "tool", "content": "a"}]}, "found 'tool'"),
    "no text": ({"messages": [ROLE, {"role": "assistant", "content": None}]}, "found NoneType"),
    "blank text": ({"messages": [{"role": "user", "content": " "}]}, '"content" of turn 1'),
    "no answer": ({"messages": [ROLE]}, "expected at least one assistant turn (found user)"),
    "half a surrogate": ({"messages": [{"role": "user", "content": "\ud800"}]}, "valid Unicode"),
    "history": ({"messages": TURNS, "history": [["a", "b"]]}, 'found more of them in "history"'),
    "system": ({"messages": TURNS, "system": "Be kind."}, 'found more of them in "system"'),
    "number": (3, "expected a JSON object or list (found '3')"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_record_is_named_and_the_others_are_read(tmp_path, name):
    record, message = BAD[name]
    path = write_jsonl(tmp_path / "a.jsonl", [SHAPES["messages"], record, SHAPES["messages"]])
    good, bad, after = read(path)
    assert isinstance(bad, BadRecord)
    assert str(bad).startswith(f"{path}:2: ")
    assert message in str(bad)
    assert good.messages == after.messages == TURNS


@pytest.mark.parametrize(
    ("line", "message"),
    [(b"{", "expected valid JSON"), (b"\xff", "expected UTF-8")],
)
def test_a_line_that_is_no_json_is_named(tmp_path, line, message):
    path = write_jsonl(tmp_path / "a.jsonl", [TURNS])
    path.write_bytes(path.read_bytes() + line + b"\n")
    assert message in str(read(path)[1])
    assert str(read(path)[1]).startswith(f"{path}:2: ")


def test_blank_lines_are_no_records(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [TURNS])
    path.write_bytes(b"\n" + path.read_bytes() + b" \n\n{\n")
    good, bad = read(path)
    assert good.messages == TURNS
    assert str(bad).startswith(f"{path}:5: ")


@pytest.mark.parametrize("first", [{"text": "a"}, [], {"messages": [{"text": "a"}]}, [[ROLE]]])
def test_a_first_record_of_no_known_shape_ends_the_reading(tmp_path, first):
    path = write_jsonl(tmp_path / "a.jsonl", [first, TURNS])
    with pytest.raises(DataError, match=r"a.jsonl:1: expected a list of turns.*found"):
        read(path)


def test_a_byte_order_mark_is_not_of_the_first_conversation(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(codecs.BOM_UTF8 + json.dumps(TURNS).encode() + b"\n")
    (record,) = read(path)
    assert not isinstance(record, BadRecord)


def test_a_cut_file_is_an_error(tmp_path):
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(json.dumps(TURNS).encode() * 50)[:-20])
    with pytest.raises(DataError, match=r"a.jsonl.gz cannot be read"):
        read(path)
