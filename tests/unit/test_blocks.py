"""Blocks of small files, and of files that end early or are damaged."""

import codecs
import gzip
import logging
import lzma

import pytest
import zstandard

from megatron_ext.data import documents
from megatron_ext.data.documents import parse_block, read_blocks
from megatron_ext.data.records import BadRecord
from megatron_ext.data.train_tokenizer import TrainTokenizerConfig, _Lines
from megatron_ext.exceptions import DataError
from tests.helpers.preprocess import run, write_as
from tests.helpers.text import make_texts, reference_dataset, same_files, train_sentencepiece

EARLY = "file ends early"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return train_sentencepiece(tmp_path_factory.mktemp("model") / "tokenizer.model")


def read(paths, **options):
    """The texts and the bad records, in order."""
    texts, bad = [], []
    for block in read_blocks(paths, keys=["text"], **options):
        for record in parse_block(block, ["text"]):
            (bad if isinstance(record, BadRecord) else texts).append(record)
    return [text for ((text,),) in texts], bad


def frames(data):
    """As parallel compressors write them: one after another."""
    compress = zstandard.ZstdCompressor().compress
    return b"".join(compress(data[i : i + 3000]) for i in range(0, len(data), 3000))


def test_a_truncated_file_is_left_out_from_where_it_ends(tmp_path, model, caplog):
    texts = make_texts(200)
    cut = write_as(tmp_path / "a.jsonl.gz", texts)
    cut.write_bytes(cut.read_bytes()[: cut.stat().st_size * 2 // 3])
    empty = tmp_path / "b.jsonl.zst"
    empty.touch()
    whole = write_as(tmp_path / "c.jsonl", texts[:20])
    paths = [cut, empty, whole]
    result = run(model, paths, tmp_path / "o", on_error="skip", workers=2, backend="reference")
    assert result.skipped == result.manifests[0].skipped == {EARLY: 2}
    for path in paths[:2]:
        assert f"skipped {path}: {EARLY} (" in caplog.text
    kept = result.manifests[0].documents - 20
    assert 50 < kept < 200
    expected = [[text] for text in (*texts[:kept], *texts[:20])]
    expected = reference_dataset(tmp_path / "r", expected, model=model, append_eod=False)
    assert same_files(result.prefixes[0], expected)


def test_every_file_that_ends_early_is_named(tmp_path, caplog):
    paths = [write_as(tmp_path / f"{i}.jsonl.gz", ["a text"] * 50) for i in range(5)]
    for path in paths:
        path.write_bytes(path.read_bytes()[:-9])
    config = TrainTokenizerConfig(
        inputs=list(map(str, paths)), output="none", vocab_size=300, on_error="skip"
    )
    caplog.set_level(logging.WARNING)
    lines = _Lines(config)
    assert len(list(lines)) == 250  # the check sum alone was cut
    assert lines.skipped == {EARLY: 5}
    assert [message.split(":")[0] for message in caplog.messages] == [f"skipped {p}" for p in paths]


@pytest.mark.parametrize("pack", [gzip.compress, frames, lzma.compress])
@pytest.mark.parametrize("unit", ["line", "paragraph", "file"])
def test_nothing_that_was_cut_is_a_document(tmp_path, pack, unit):
    """Wherever the file ends, also at the end of a line."""
    suffix = {gzip.compress: "gz", frames: "zst", lzma.compress: "xz"}[pack]
    lines = [f"{i} {text}".split("\n")[0] for i, text in enumerate(make_texts(300))]
    data = pack("\n\n".join(lines).encode())
    path = tmp_path / f"a.txt.{suffix}"
    most = 0
    for size in range(0, len(data), len(data) // 23):
        path.write_bytes(data[:size])
        texts, bad = read([path], text_unit=unit, skip_broken=True)
        assert texts == lines[: len(texts)]
        assert [(record.where, record.reason) for record in bad] == [(str(path), EARLY)]
        with pytest.raises(DataError, match=f"{path.name} cannot be read: "):
            read([path], text_unit=unit)
        most = max(most, len(texts))
    assert most == 0 if unit == "file" else most > 200


def test_damaged_data_are_told_from_data_that_end(tmp_path):
    packed = bytearray(gzip.compress(b'{"text": "a"}\n' * 100))
    packed[-8] ^= 1  # of the check sum
    (tmp_path / "a.jsonl.gz").write_bytes(packed)
    (tmp_path / "b.jsonl.gz").write_bytes(b'{"text": "not gzip"}\n')
    texts, bad = read(sorted(tmp_path.iterdir()), skip_broken=True)
    assert len(texts) == 100
    assert [record.reason for record in bad] == ["file is damaged"] * 2
    with pytest.raises(
        DataError, match=r"c\.jsonl\.gz cannot be read: "
    ):  # a disk's error stays one
        read([tmp_path / "c.jsonl.gz"], skip_broken=True)


@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_a_byte_order_mark_is_not_of_the_first_record(tmp_path, pack, monkeypatch):
    monkeypatch.setattr(documents, "BLOCK_BYTES", 40)
    line = '{"text": "\ufeffa"}\n'.encode()
    path = tmp_path / f"a.jsonl{'.gz' if pack is gzip.compress else ''}"
    path.write_bytes(pack(codecs.BOM_UTF8 + line * 5))
    assert read([path]) == (["\ufeffa"] * 5, [])
    path.write_bytes(pack(line + codecs.BOM_UTF8 + line))  # elsewhere it is no mark
    _, bad = read([path])
    assert [record.reason for record in bad] == ["not valid JSON"]
    path = tmp_path / "a.txt"
    path.write_bytes(b"x" * 40 + codecs.BOM_UTF8 + b"y")
    assert read([path]) == (["x" * 40 + "\ufeffy"], [])


def test_small_texts_are_read_together_and_named_apart(tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "BLOCK_BYTES", 1000)
    contents = [b"x%d" % i * 20 for i in range(60)]
    contents[33] = b"\xff"
    contents[7:9] = b"", b"long" * 1000
    paths = [tmp_path / f"{i:02}.txt" for i in range(60)]
    for path, content in zip(paths, contents, strict=True):
        path.write_bytes(content)
    records = write_as(tmp_path / "a.jsonl", ["record", "another"])
    order = [*paths[:40], records, *paths[40:]]
    blocks = list(read_blocks(order, keys=["text"]))
    assert len(blocks) < 12
    assert [block.index for block in blocks] == list(range(len(blocks)))
    assert sum(block.consumed for block in blocks) == sum(path.stat().st_size for path in order)
    parsed = [
        (block, text)
        for block in blocks
        for record in parse_block(block, ["text"])
        if not isinstance(record, BadRecord)
        for text in record[0]
    ]
    found = [text for _, text in parsed]
    texts = [content.decode() for content in contents if content != b"\xff"]
    assert found == [*texts[:39], "record", "another", *texts[39:]]
    _, (bad,) = read(order)
    assert str(bad).startswith(f"{paths[33]}:1: not UTF-8 (")
    owners = {text: block.file_of(text) for block, text in parsed}
    assert owners[texts[20]] == str(paths[20])
    assert owners["record"] == str(records)


def test_small_texts_give_the_bytes_of_the_reference(tmp_path, model):
    texts = make_texts(60)
    for i, text in enumerate(texts):
        (tmp_path / f"{i:02}.txt").write_bytes(text.encode())
    result = run(model, [tmp_path], tmp_path / "o", append_eod=True)
    expected = [[text] for text in texts]
    expected = reference_dataset(tmp_path / "r", expected, model=model, append_eod=True)
    assert same_files(result.prefixes[0], expected)
