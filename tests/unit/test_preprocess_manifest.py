"""Manifests, and the cheap checks of a data set before training."""

import dataclasses
import io
import json
from pathlib import Path

import numpy as np
import pytest

from megatron_ext.data import indexed
from megatron_ext.data.indexed import HEADER, IndexedWriter, read_index_summary
from megatron_ext.data.manifest import check_prefix, manifest_path, read_manifest, write_manifest
from megatron_ext.data.preprocess import PreprocessConfig, preprocess
from megatron_ext.data.tokenizers import TokenizerSpec, tokenizer_digest
from megatron_ext.exceptions import ConfigError, DataError
from tests.helpers.text import make_texts, train_sentencepiece, write_dataset, write_jsonl


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """A data set made by preprocessing: prefix, tokenizer, manifest."""
    folder = tmp_path_factory.mktemp("data")
    spec = TokenizerSpec(
        tokenizer_type="SentencePieceTokenizer",
        tokenizer_model=train_sentencepiece(folder / "t.model"),
    )
    source = write_jsonl(folder / "a.jsonl", [{"text": text} for text in make_texts(20)])
    result = preprocess(
        PreprocessConfig(inputs=[source], output_prefix=str(folder / "o"), tokenizer=spec)
    )
    return result.prefixes[0], spec, result.manifests[0]


@pytest.fixture
def copy(dataset, tmp_path):
    """A copy of it that a test may break."""
    for suffix in (".bin", ".idx", ".manifest.json"):
        (tmp_path / f"c{suffix}").write_bytes(Path(f"{dataset[0]}{suffix}").read_bytes())
    return str(tmp_path / "c")


def test_manifest_describes_the_data(dataset):
    prefix, spec, manifest = dataset
    read = read_manifest(prefix)
    assert read == manifest
    assert read.tokenizer_model == "t.model"
    assert read.tokenizer_digest == tokenizer_digest(spec)
    tokens = np.fromfile(f"{prefix}.bin", dtype=read.dtype)
    assert (len(tokens), int(tokens.max())) == (read.tokens, read.max_token_id)
    assert [(Path(s.path).name, s.bytes) for s in read.sources] == [
        ("a.jsonl", Path(prefix).with_name("a.jsonl").stat().st_size)
    ]
    summary = check_prefix(
        prefix, vocab_size=read.vocab_size, tokenizer_digest=tokenizer_digest(spec)
    )
    assert (summary.documents, summary.tokens) == (20, read.tokens)


def test_manifest_is_written_once(tmp_path, dataset):
    manifest = dataset[2]
    assert read_manifest(tmp_path / "p") is None
    write_manifest(tmp_path / "p", manifest)
    with pytest.raises(ConfigError, match="exists"):
        write_manifest(tmp_path / "p", manifest)
    write_manifest(tmp_path / "p", dataclasses.replace(manifest, tokens=7), overwrite=True)
    assert read_manifest(tmp_path / "p").tokens == 7
    assert [path.name for path in tmp_path.iterdir()] == ["p.manifest.json"]


@pytest.mark.parametrize("suffix", [".bin", ".idx"])
@pytest.mark.parametrize("change", ["missing", "truncated", "longer", "empty"])
def test_broken_files_are_named(copy, dataset, suffix, change):
    path = Path(f"{copy}{suffix}")
    data = path.read_bytes()
    if change == "missing":
        path.unlink()
    else:
        path.write_bytes({"truncated": data[:-1], "longer": data + b"\0", "empty": b""}[change])
    with pytest.raises(DataError, match=path.name):
        check_prefix(copy, vocab_size=dataset[2].vocab_size)


@pytest.mark.parametrize("suffix", [".bin", ".idx"])
def test_a_file_in_the_place_of_a_prefix_is_told(copy, dataset, suffix):
    with pytest.raises(DataError) as refused:
        check_prefix(f"{copy}{suffix}", vocab_size=dataset[2].vocab_size)
    assert str(refused.value) == (
        f"{copy}{suffix}: expected the prefix of a data set, without .bin or .idx, such as {copy}"
    )
    for name in (".bin", ".idx"):  # a prefix may end so by itself
        Path(f"{copy}{name}").rename(f"{copy}{suffix}{name}")
    assert read_index_summary(f"{copy}{suffix}").documents == dataset[2].documents


def test_broken_index_content(copy, dataset):
    path = Path(f"{copy}.idx")
    data = path.read_bytes()
    for broken, message in [
        (b"X" + data[1:], "wrong header"),
        (data[:9] + b"\x02" + data[10:], "wrong header"),
        (data[:17] + b"\x07" + data[18:], "holds no token ids"),
        (data[:-8] + b"\x01" + data[-7:], "documents end at 1 of"),
    ]:
        path.write_bytes(broken)
        with pytest.raises(DataError, match=message):
            read_index_summary(copy)


def test_empty_data_set(tmp_path):
    with pytest.raises(DataError, match="empty"):
        check_prefix(write_dataset(tmp_path / "e", []), vocab_size=10)
    with pytest.raises(DataError, match="empty"):
        check_prefix(write_dataset(tmp_path / "f", [[], []]), vocab_size=10)


def test_another_tokenizer_is_refused(copy, dataset):
    manifest = dataset[2]
    with pytest.raises(
        DataError, match=rf"{manifest.vocab_size} pieces, but the tokenizer given has 99"
    ):
        check_prefix(copy, vocab_size=99)
    with pytest.raises(DataError, match=r"manifest\.json.*SHA-256"):
        check_prefix(copy, vocab_size=manifest.vocab_size, tokenizer_digest="0" * 64)


def test_another_end_of_text_is_refused_where_documents_end_in_it(copy, dataset):
    manifest = dataset[2]
    size, other = manifest.vocab_size, manifest.eod_id + 1
    check_prefix(copy, vocab_size=size, eod_id=other)  # no document ends in one
    path = manifest_path(copy)
    path.write_text(json.dumps(json.loads(path.read_bytes()) | {"append_eod": True}))
    check_prefix(copy, vocab_size=size, eod_id=manifest.eod_id)
    with pytest.raises(DataError, match=f"end in token id {manifest.eod_id}, .* end in {other}"):
        check_prefix(copy, vocab_size=size, eod_id=other)


def test_manifest_of_other_data_or_format(copy, dataset):
    path = manifest_path(copy)
    fields = json.loads(path.read_bytes())
    for change, message in [
        ({"tokens": fields["tokens"] + 1}, "belongs to other data"),
        ({"format_version": 2}, "expected format version 1, found 2"),
        ({"surprise": 1}, "not a complete manifest"),
    ]:
        path.write_text(json.dumps(fields | change))
        with pytest.raises(DataError, match=message):
            check_prefix(copy, vocab_size=dataset[2].vocab_size)
    path.write_text("{")
    with pytest.raises(DataError, match="cannot be read"):
        read_manifest(copy)


@pytest.mark.parametrize("where", [0, 499_999, 999_999])
def test_without_manifest_ids_are_sampled(tmp_path, where):
    """An id is found at both ends and wherever it is frequent; that a single one may escape is documented."""
    ids = np.full(1_000_000, 5)
    spread = slice(where, where + 1) if where != 499_999 else slice(400_000, 600_000)
    ids[spread] = 1000
    prefix = write_dataset(tmp_path / "m", [ids])
    assert check_prefix(prefix, vocab_size=1001).tokens == 1_000_000
    with pytest.raises(DataError, match=r"m\.bin holds token id 1000, but the tokenizer has 1000"):
        check_prefix(prefix, vocab_size=1000)


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_summary_of_megatrons_own_files(tmp_path, dtype):
    prefix = write_dataset(tmp_path / "m", [[1, 2], [], [3]], dtype)
    summary = read_index_summary(prefix)
    assert (summary.documents, summary.sequences, summary.tokens) == (3, 2, 3)
    assert summary.dtype == dtype
    assert HEADER.size == 34


def test_an_index_of_several_chunks_is_megatrons(tmp_path, monkeypatch):
    """Written a million entries at a time: what lies before a chunk counts in all of its offsets."""
    monkeypatch.setattr(indexed, "_INDEX_CHUNK", 3)
    lengths = np.array([1, 4, 2, 8, 5, 7, 3], np.int32)
    documents = [np.arange(length) for length in lengths]
    files = io.BytesIO(), io.BytesIO()
    writer = IndexedWriter(*files, np.dtype(np.uint16))
    tokens = np.concatenate(documents).astype(np.uint16).tobytes()
    each = np.ones(len(lengths), np.int32)
    writer.append(tokens, sequence_lengths=lengths, document_sequences=each)
    writer.finish()
    prefix = write_dataset(tmp_path / "m", documents, np.uint16)
    for file, suffix in zip(files, ("bin", "idx"), strict=True):
        assert file.getvalue() == Path(f"{prefix}.{suffix}").read_bytes()
