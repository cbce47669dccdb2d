"""Preprocessing against an independent reference: bytes, formats, order."""

import bz2
import gzip
import logging
import lzma
import os
from pathlib import Path, PurePath

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from megatron_ext.data import documents
from megatron_ext.data.inputs import find_inputs
from megatron_ext.exceptions import ConfigError, DataError
from tests.helpers.preprocess import run, write_as
from tests.helpers.text import (
    make_texts,
    reference_dataset,
    same_files,
    train_sentencepiece,
    write_jsonl,
)
from tools import preprocess_data


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return train_sentencepiece(tmp_path_factory.mktemp("model") / "tokenizer.model")


@pytest.mark.parametrize("append_eod", [False, True])
@pytest.mark.parametrize("backend", ["gigatoken", "reference"])
@pytest.mark.parametrize("workers", [1, 2])
def test_bytes_are_those_of_the_reference(
    tmp_path, model, append_eod, backend, workers, monkeypatch
):
    if workers == 2 and (append_eod, backend) == (False, "reference"):
        pytest.skip("covered by the other three")
    monkeypatch.setattr(documents, "BLOCK_BYTES", 4096)  # some 100 blocks
    texts = make_texts(300)
    source = write_jsonl(tmp_path / "a.jsonl", [{"id": i, "text": t} for i, t in enumerate(texts)])
    result = run(
        model, [source], tmp_path / "o", append_eod=append_eod, backend=backend, workers=workers
    )
    expected = reference_dataset(
        tmp_path / "r", [[text] for text in texts], model=model, append_eod=append_eod
    )
    assert result.prefixes == [str(tmp_path / "o_text_document")]
    assert same_files(result.prefixes[0], expected)
    assert result.manifests[0].backend == backend
    assert result.manifests[0].documents == 300


def test_lists_of_sentences_and_several_keys(tmp_path, model):
    records = [
        {"text": ["one", "", "two"], "note": "n"},
        {"text": [], "note": ""},
        {"text": "three", "note": ["x", "y"]},
    ]
    source = write_jsonl(tmp_path / "a.jsonl", records)
    result = run(model, [source], tmp_path / "o", keys=["text", "note"], append_eod=True)
    for key in ("text", "note"):
        lists = [r[key] if isinstance(r[key], list) else [r[key]] for r in records]
        expected = reference_dataset(tmp_path / f"r_{key}", lists, model=model, append_eod=True)
        assert same_files(tmp_path / f"o_{key}_document", expected)
    assert len(result.manifests) == 2


def test_large_vocabulary_is_int32(tmp_path, model, monkeypatch):
    source = write_jsonl(tmp_path / "a.jsonl", [{"text": "the quick fox"}])
    monkeypatch.setattr("sentencepiece.SentencePieceProcessor.vocab_size", lambda self: 65500)
    result = run(model, [source], tmp_path / "o", backend="reference")
    expected = reference_dataset(tmp_path / "r", [["the quick fox"]], model=model, append_eod=False)
    assert result.manifests[0].dtype == "int32"
    assert same_files(result.prefixes[0], expected)


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.jsonl.gz", "a.jsonl.zst", "a.parquet"])
def test_formats(tmp_path, model, name, monkeypatch):
    monkeypatch.setattr(documents, "BLOCK_BYTES", 2000)
    monkeypatch.setattr(documents, "_PARQUET_ROWS", 10)
    texts = make_texts(60)
    result = run(model, [write_as(tmp_path / name, texts)], tmp_path / "o", append_eod=True)
    expected = reference_dataset(tmp_path / "r", [[t] for t in texts], model=model, append_eod=True)
    assert same_files(result.prefixes[0], expected)


@pytest.mark.parametrize(
    ("unit", "expected"),
    [
        ("file", ["a b\r\nc\n\n\n  \nd e\n\nf", "second\n"]),
        ("line", ["a b", "c", "d e", "f", "second"]),
        ("paragraph", ["a b\r\nc", "d e", "f", "second"]),
    ],
)
def test_plain_text_units(tmp_path, model, unit, expected):
    # The mark with which some editors begin a file of UTF-8 is no text.
    (tmp_path / "1.txt").write_bytes(b"\xef\xbb\xbfa b\r\nc\n\n\n  \nd e\n\nf")
    with gzip.open(tmp_path / "2.txt.gz", "wb") as stream:
        stream.write(b"second\n")
    result = run(model, [tmp_path], tmp_path / "o", text_unit=unit)
    reference = reference_dataset(
        tmp_path / "r", [[text] for text in expected], model=model, append_eod=False
    )
    assert same_files(result.prefixes[0], reference)


def test_many_inputs_keep_their_order(tmp_path, model, monkeypatch):
    monkeypatch.setattr(documents, "BLOCK_BYTES", 500)
    texts = make_texts(90)
    folder = tmp_path / "in"
    (folder / "sub").mkdir(parents=True)
    write_as(folder / "b.jsonl", texts[30:50])
    write_as(folder / "sub" / "c.parquet", texts[50:70])
    (folder / "ignored.bin").write_bytes(b"\xff")
    last, first = write_as(tmp_path / "0.jsonl.gz", texts[70:]), tmp_path / "z.jsonl"
    write_as(first, texts[:30])
    result = run(model, [first, folder, tmp_path / "0*.gz"], tmp_path / "o", workers=2)
    expected = reference_dataset(
        tmp_path / "r", [[t] for t in texts], model=model, append_eod=False
    )
    assert same_files(result.prefixes[0], expected)
    assert [Path(s.path).name for s in result.manifests[0].sources] == [
        *("z.jsonl", "b.jsonl", "c.parquet", last.name),
    ]


def test_directories_are_read_behind_links_and_without_what_is_hidden(tmp_path):
    folder, elsewhere = tmp_path / "in", tmp_path / "elsewhere"
    for name in ("in/a.jsonl", "in/.b.jsonl", "in/.cache/c.jsonl", "elsewhere/d.jsonl"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("{}")
    (folder / "link").symlink_to(elsewhere)
    for name in ("circle", "again"):
        (elsewhere / name).symlink_to(folder)
    assert find_inputs([str(folder)]) == [folder / "a.jsonl", folder / "link" / "d.jsonl"]


def test_what_is_not_finished_is_left_out_and_what_is_left_out_is_told(tmp_path, caplog):
    """As Spark and Hadoop leave it: names that begin with _ are not data."""
    caplog.set_level(logging.INFO)
    names = (
        "part-0.JSONL",
        "part-1.Json.GZ",
        "_temporary/0/part-2.json",
        "_SUCCESS",
        ".part-0.crc",
    )
    for name in (*names, "a.csv", "below/b.csv", "LICENSE", "o.manifest.json"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("{}")
    assert [path.name for path in find_inputs([str(tmp_path)])] == list(names[:2])
    assert caplog.messages == [
        f"--input {tmp_path}: taken: 1 .jsonl, 1 .json.gz; left out: 3 hidden or unfinished "
        "(.part-0.crc), 2 .csv (a.csv), 1 without a suffix (LICENSE), 1 .manifest.json (o.manifest.json)"
    ]
    with pytest.raises(ConfigError, match=r"in this directory; left out: 1 \.csv \(b\.csv\)$"):
        find_inputs([str(tmp_path / "below")])
    # Who names a file means it.
    assert find_inputs([str(tmp_path / names[2])]) == [tmp_path / names[2]]


def test_a_directory_is_gone_through_once(tmp_path, monkeypatch):
    for i in range(300):
        (tmp_path / f"{i}.txt").touch()
    compared = []
    equal = PurePath.__eq__
    monkeypatch.setattr(
        PurePath, "__eq__", lambda one, other: compared.append(1) or equal(one, other)
    )
    assert len(find_inputs([str(tmp_path)])) == 300
    assert len(compared) <= 900  # of each file with each other one 45,000


@pytest.mark.parametrize("name", ["a.jsonl.bz2", "a.jsonl.xz", "a.JSONL.Gz", "a.Txt.ZST"])
def test_a_compression_is_known_by_its_suffix(tmp_path, name, monkeypatch):
    monkeypatch.setattr(documents, "BLOCK_BYTES", 1 << 20)
    lines = b"".join(b'{"text": "%d"}\n' % i for i in range(80_000))
    compress = {".bz2": bz2, ".xz": lzma, ".Gz": gzip}.get(Path(name).suffix)
    packed = compress.compress(lines) if compress else zstandard.ZstdCompressor().compress(lines)
    (tmp_path / name).write_bytes(packed)
    blocks = list(documents.read_blocks(find_inputs([str(tmp_path)]), keys=["text"]))
    if "Txt" in name:
        assert b"".join(blocks[0].payload) == lines
    else:
        assert len(blocks) > 1
        assert b"\n".join(block.payload for block in blocks) == lines[:-1]
    assert sum(block.consumed for block in blocks) == len(packed)
    (tmp_path / name).write_bytes(packed[: len(packed) // 2])
    with pytest.raises(DataError, match="cannot be read"):
        list(documents.read_blocks([tmp_path / name], keys=["text"]))


def test_a_directory_may_hold_the_data_sets_that_were_made_of_it(tmp_path, model):
    write_jsonl(tmp_path / "a.jsonl", [{"text": "the quick"}])
    run(model, [tmp_path], tmp_path / "one")
    (tmp_path / "one_text_document.bin.partial").touch()
    assert find_inputs([str(tmp_path)]) == [tmp_path / "a.jsonl"]
    result = run(model, [tmp_path], tmp_path / "two")
    assert result.manifests[0].documents == 1


def test_a_directory_with_a_note_beside_its_records_is_refused(tmp_path):
    (tmp_path / "a.jsonl").write_text("{}")
    (tmp_path / "README.md").write_text("no data")
    with pytest.raises(ConfigError, match=r"expected records or plain text .*README\.md"):
        find_inputs([str(tmp_path)])
    assert find_inputs([f"{tmp_path}/*.jsonl"]) == [tmp_path / "a.jsonl"]


def test_what_decompression_left_behind_is_not_read_twice(tmp_path):
    plain, packed, other = (tmp_path / name for name in ("a.jsonl", "a.jsonl.zst", "b.jsonl.gz"))
    for path in (plain, packed, other):
        path.write_bytes(b"{}")
    for words in ([str(tmp_path)], [f"{tmp_path}/a*"], [str(packed), str(plain)]):
        with pytest.raises(ConfigError, match=r"names .*a\.jsonl.* and .*a\.jsonl.*, expected one"):
            find_inputs(words)
    packed.unlink()
    assert find_inputs([str(tmp_path)]) == [plain, other]


def test_zstandard_frames_of_any_window_and_frames_to_be_skipped(tmp_path):
    """As ``zstd --long=31`` and parallel compressors write them."""
    lines = b'{"text": "a"}\n' * 100
    window = zstandard.ZstdCompressionParameters(window_log=31, enable_ldm=True)
    compress = zstandard.ZstdCompressor(compression_params=window).compressobj()
    skipped = b"\x50\x2a\x4d\x18\x03\x00\x00\x00abc"
    path = tmp_path / "a.jsonl.zst"
    path.write_bytes(skipped + compress.compress(lines) + compress.flush() + skipped)
    (block,) = documents.read_blocks([path], keys=["text"])
    assert block.payload == lines[:-1]


def test_blocks_of_parquet_are_bounded_by_their_text(tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "BLOCK_BYTES", 1 << 20)
    table = pa.table({"text": ["x" * 200_000] * 60, "more": ["y" * 900_000] * 60})
    pq.write_table(table, tmp_path / "a.parquet", use_dictionary=False)
    blocks = list(documents.read_blocks([tmp_path / "a.parquet"], keys=["text"]))
    assert sum(block.payload.num_rows for block in blocks) == 60
    assert max(block.payload.nbytes for block in blocks) <= documents.BLOCK_BYTES
    assert len(blocks) == 12


def test_a_job_has_as_many_workers_as_processors_of_its_own(monkeypatch):
    needed = ["--input", "a", "--output-prefix", "o", "--tokenizer-model", "m"]
    needed += ["--tokenizer-type", "SentencePieceTokenizer"]
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {3, 4, 5}, raising=False)
    assert preprocess_data.parse_args(needed).workers == 3
    monkeypatch.delattr(os, "sched_getaffinity")  # as on macOS
    assert preprocess_data.parse_args(needed).workers == os.cpu_count()


def test_megatron_reads_the_output(tmp_path, model):
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    source = write_jsonl(
        tmp_path / "a.jsonl", [{"text": "the quick"}, {"text": ""}, {"text": "fox"}]
    )
    result = run(model, [source], tmp_path / "o", append_eod=True)
    dataset = IndexedDataset(result.prefixes[0])
    assert len(dataset) == 2
    assert dataset.document_indices.tolist() == [0, 1, 1, 2]
    assert dataset[0][-1] == dataset[1][-1] == result.manifests[0].eod_id
    assert max(int(np.max(dataset[i])) for i in range(2)) == result.manifests[0].max_token_id
