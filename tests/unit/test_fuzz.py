"""Readers meet files that somebody damaged or made up: a clear error, or a result; no crash, no flood."""

import codecs
import gzip
import io
import json
import pickle
import tracemalloc
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import torch
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata

from megatron_ext.checkpoint.safe_load import load_metadata
from megatron_ext.conversion.safetensors import INDEX, SINGLE, SafetensorsReader
from megatron_ext.data.chat import Conversation, read_conversations
from megatron_ext.data.documents import parse_block, read_blocks
from megatron_ext.data.indexed import HEADER, MAGIC
from megatron_ext.data.manifest import Manifest, Source, check_prefix, manifest_path, read_manifest
from megatron_ext.data.overlap import shared_content
from megatron_ext.data.records import BadRecord
from megatron_ext.data.verify import verify
from megatron_ext.exceptions import CheckpointError, DataError
from tests.helpers.text import write_dataset

# What a reader may take for files of a few kilobytes; its own buffers are at most 32 MB.
MEMORY = 100 << 20
# The same examples in every run; a longer search is for when a reader changes.
FUZZ = settings(
    max_examples=80,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=6,
)
TURNS = st.lists(
    st.dictionaries(st.sampled_from(["role", "content", "from", "value"]), JSON | st.just("user")),
    max_size=3,
)
RECORDS = st.dictionaries(
    st.sampled_from(["text", "messages", "conversations", "query", "response"]),
    JSON | TURNS,
    max_size=2,
)
LINES = st.lists(
    st.one_of(
        RECORDS.map(lambda value: json.dumps(value).encode()),
        JSON.map(lambda value: json.dumps(value).encode()),
        st.binary(max_size=20),
        st.sampled_from([b"[" * 100_000, b'{"text": "\\ud800"}', b'{"text": 1e999}', b"\xff\xfe"]),
    ),
    max_size=6,
)


@contextmanager
def bounded():
    """Fails if the memory of Python and numpy grows beyond the bound."""
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < MEMORY
    finally:
        tracemalloc.stop()


@contextmanager
def clear(kind, name, *, allowed=True):
    """Lets an error of this kind pass if it names the file, and nothing else."""
    found = None
    try:
        yield
    except kind as error:
        found = str(error)
    assert found is None or (allowed and name in found)


@st.composite
def damage(draw, content):
    """A file after some of its bytes were changed, cut off or added."""
    content = bytearray(content)
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, max(0, len(content) - 1)))
        new = draw(st.binary(min_size=1, max_size=8) | st.sampled_from([b"\xff" * 8, b"\0" * 8]))
        content[at : at + len(new)] = new
    cut = draw(st.sampled_from([0, 0, 0, 1, 8, len(content) // 2, len(content)]))
    return bytes(content[: len(content) - cut])


@FUZZ
@given(lines=LINES, packing=st.sampled_from(["", ".gz", ".zst"]), broken=st.booleans())
def test_json_lines(tmp_path, lines, packing, broken):
    """Every line but blank ones is a record or a bad one, in both readers; what does not unpack is named."""
    content = b"\n".join(lines)
    packed = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.compress}[packing](content)
    path = tmp_path / f"lines.jsonl{packing}"
    path.write_bytes(packed[: len(packed) // 2] if broken else packed)
    with bounded():
        with clear(DataError, path.name, allowed=broken):
            found = [
                r for b in read_blocks([path], keys=["text"]) for r in parse_block(b, ["text"])
            ]
            if not broken:
                text = content.removeprefix(codecs.BOM_UTF8)
                assert len(found) == sum(bool(line.strip()) for line in text.split(b"\n"))
            for record in found:
                assert isinstance(record, BadRecord) or all(isinstance(t, str) for t in record[0])
        with clear(DataError, path.name):
            for turn in read_conversations([path]):
                assert isinstance(turn, Conversation | BadRecord)


def good_data(folder):
    prefix = write_dataset(folder / "d", [[1, 2, 3], [], [4, 5]])
    manifest = Manifest(
        **dict.fromkeys(("tokenizer_type", "tokenizer_model", "tokenizer_digest", "backend"), "x"),
        **{"vocab_size": 9, "eod_id": None, "append_eod": False, "dtype": "uint16"},
        **{"documents": 3, "sequences": 2, "tokens": 5, "max_token_id": 5, "skipped": {}},
        sources=[Source(path="a", bytes=1)],
        document_sample=["00ff"],
    )
    return prefix, manifest


def check_all(prefix):
    """What training and the tool do with a data set."""
    for check in (check_prefix, verify):
        with bounded(), clear(DataError, Path(prefix).name):
            check(prefix, vocab_size=9)


@FUZZ
@given(data=st.data())
def test_indices_and_tokens(tmp_path, data):
    prefix, _ = good_data(tmp_path)
    for suffix in data.draw(st.sampled_from([(".idx",), (".bin",), (".idx", ".bin")])):
        path = Path(f"{prefix}{suffix}")
        path.write_bytes(data.draw(damage(path.read_bytes())))
    check_all(prefix)


@FUZZ
@given(
    code=st.integers(0, 255),
    sizes=st.tuples(*[st.integers(0, 2**64 - 1) | st.integers(0, 20)] * 2),
    rest=st.binary(max_size=200),
)
def test_index_headers_that_promise_anything(tmp_path, code, sizes, rest):
    prefix, _ = good_data(tmp_path)
    Path(f"{prefix}.idx").write_bytes(HEADER.pack(MAGIC, 1, code, *sizes) + rest)
    check_all(prefix)


@FUZZ
@given(data=st.data())
def test_manifests(tmp_path, data):
    """Every field takes every value that JSON has, or none."""
    prefix, manifest = good_data(tmp_path)
    fields = json.loads(manifest.to_json())
    for name in data.draw(st.lists(st.sampled_from(sorted(fields)), max_size=2, unique=True)):
        fields[name] = data.draw(JSON)
        if data.draw(st.booleans()):
            del fields[name]
    content = json.dumps(fields).encode()
    if data.draw(st.booleans()):
        content = data.draw(damage(content))
    manifest_path(prefix).write_bytes(content)
    check_all(prefix)
    with suppress(DataError):
        read = read_manifest(prefix)
        shared_content("a", read, "b", manifest)
        shared_content("a", manifest, "b", read)


def test_a_manifest_nested_beyond_all_depth(tmp_path):
    prefix, _ = good_data(tmp_path)
    manifest_path(prefix).write_bytes(b"[" * 200_000)
    with pytest.raises(DataError, match="cannot be read as a manifest"):
        read_manifest(prefix)


@FUZZ
@given(data=st.data())
def test_safetensors(tmp_path, data):
    """A header may promise any tensor, an index any file."""
    save_file({"a": torch.ones(2, 3), "b": torch.zeros(4).bfloat16()}, tmp_path / SINGLE)
    (tmp_path / INDEX).unlink(missing_ok=True)
    if data.draw(st.booleans()):
        path = tmp_path / SINGLE
        path.write_bytes(data.draw(damage(path.read_bytes())))
    else:
        index = data.draw(JSON | st.dictionaries(st.just("weight_map"), JSON))
        (tmp_path / INDEX).write_text(json.dumps(index))
    with bounded(), clear(CheckpointError, str(tmp_path)), SafetensorsReader(tmp_path) as reader:
        for name in reader.names():
            shape, _ = reader.describe(name)
            assert tuple(reader.read(name).shape) == shape


@FUZZ
@given(data=st.data())
def test_metadata_of_checkpoints(tmp_path, data):
    """Nothing is called but what metadata consist of; `open_checkpoint` names the folder of the rest."""
    path = tmp_path / "metadata"
    good = pickle.dumps(Metadata({"a": BytesStorageMetadata()}, None, {}))
    path.write_bytes(data.draw(damage(good) | st.binary(max_size=100)))
    with path.open("rb") as stream, bounded(), suppress(pickle.UnpicklingError):
        load_metadata(stream)


@pytest.mark.parametrize(
    "greedy",
    [
        b"\x80\x04Nr" + (2**26).to_bytes(4, "little") + b".",  # remember as number 2^26
        b"\x80\x04\x8e" + (2**28).to_bytes(8, "little") + b".",  # 2^28 bytes follow
    ],
)
def test_metadata_that_ask_for_much_memory(greedy):
    with bounded(), suppress(pickle.UnpicklingError):
        load_metadata(io.BytesIO(greedy))
