"""Preprocessing of bad records and with bad settings: errors that say so."""

import os

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megatron_ext.data import documents, encode, fast_tokenizer, preprocess, workers
from megatron_ext.data.manifest import read_manifest
from megatron_ext.exceptions import ConfigError, DataError
from tests.helpers.preprocess import run, tool, write_as
from tests.helpers.text import (
    make_texts,
    reference_dataset,
    same_files,
    train_sentencepiece,
    write_jsonl,
)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return train_sentencepiece(tmp_path_factory.mktemp("model") / "tokenizer.model")


BAD_LINES = {
    "not valid JSON": b'{"text": "a"',
    "expected a JSON object": b'["text"]',
    "no key 'text'": b'{"txt": "a"}',
    "expected a string at 'text'": b'{"text": 3}',
    "text at 'text' is not valid Unicode": b'{"text": "\\ud800"}',
    "not UTF-8": b'{"text": "\xff"}',
}


@pytest.mark.parametrize("reason", BAD_LINES)
@pytest.mark.parametrize("workers", [1, 2])
def test_bad_line_fails_with_its_number(tmp_path, model, reason, workers, monkeypatch):
    if workers == 2 and reason != "not UTF-8":
        pytest.skip("one reason is enough to see errors come back from a worker")
    monkeypatch.setattr(documents, "BLOCK_BYTES", 64)
    good = b'{"text": "some good text"}'
    source = tmp_path / "a.jsonl"
    source.write_bytes(b"\n".join([*[good] * 40, BAD_LINES[reason], *[good] * 5, b"{"]) + b"\n")
    with pytest.raises(DataError) as error:
        run(model, [source], tmp_path / "o", workers=workers)
    assert str(error.value).startswith(f"{source}:41: {reason}")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.jsonl"]


def test_blank_lines_are_no_records(tmp_path, model):
    """As files joined by `cat` have between them, or one has at its end; later lines keep their numbers."""
    lines = [b"", b'{"text": "a"}', b"  \r", b'{"text": "b"}', b"", b""]
    source = tmp_path / "a.jsonl"
    source.write_bytes(b"\n".join(lines))
    assert run(model, [source], tmp_path / "o").manifests[0].documents == 2
    source.write_bytes(b"\n".join([*lines, b"{"]))
    with pytest.raises(DataError, match=r"a\.jsonl:7: not valid JSON"):
        run(model, [source], tmp_path / "p")


def test_a_worker_that_dies_leaves_the_names_of_what_was_in_work(tmp_path, model, monkeypatch):
    monkeypatch.setattr(documents, "BLOCK_BYTES", 64)
    source = write_as(tmp_path / "a.jsonl", ["some text " * 20] * 30)
    monkeypatch.setattr(workers, "_load", _die)
    with pytest.raises(DataError, match=r"fewer --workers; in work were .*a\.jsonl:\d+ to .*:\d+$"):
        run(model, [source], tmp_path / "o", workers=2)


def _die(*_):
    os._exit(1)


def test_bad_lines_are_skipped_and_counted(tmp_path, model, monkeypatch):
    monkeypatch.setattr(documents, "BLOCK_BYTES", 100)
    source = tmp_path / "a.jsonl"
    lines = [line for bad in BAD_LINES.values() for line in (b'{"text": "good"}', bad, bad)]
    source.write_bytes(b"\n".join(lines))
    result = run(model, [source], tmp_path / "o", on_error="skip")
    assert result.skipped == dict.fromkeys(BAD_LINES, 2)
    expected = reference_dataset(
        tmp_path / "r", [["good"]] * len(BAD_LINES), model=model, append_eod=False
    )
    assert same_files(result.prefixes[0], expected)
    assert read_manifest(result.prefixes[0]).skipped == result.skipped


def test_bad_rows_and_texts(tmp_path, model):
    table = pa.table({"text": ["a", None, "b"]})
    pq.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"a\.parquet: row 2: expected a string .*found NoneType"):
        run(model, [tmp_path / "a.parquet"], tmp_path / "o")
    with pytest.raises(DataError, match=r"expected one column 'body', found text"):
        run(model, [tmp_path / "a.parquet"], tmp_path / "o", keys=["body"])
    twice = pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["text", "text"])
    pq.write_table(twice, tmp_path / "b.parquet")
    with pytest.raises(
        DataError, match=r"b\.parquet: expected one column 'text', found text, text"
    ):
        run(model, [tmp_path / "b.parquet"], tmp_path / "o")
    (tmp_path / "a.txt").write_bytes(b"good\n\xff\n")
    with pytest.raises(DataError, match=r"a\.txt:2: not UTF-8"):
        run(model, [tmp_path / "a.txt"], tmp_path / "o", text_unit="line")


def test_a_row_that_is_not_utf8_is_named_and_skipped(tmp_path, model):
    """Parquet calls a column text without a look at its bytes."""
    bounds = pa.py_buffer(np.array([0, 4, 6, 9], dtype=np.int32))
    column = pa.Array.from_buffers(pa.string(), 3, [None, bounds, pa.py_buffer(b"good\xff\xfefox")])
    pq.write_table(pa.table({"text": column}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"a\.parquet: row 2: not UTF-8"):
        run(model, [tmp_path / "a.parquet"], tmp_path / "o")
    result = run(model, [tmp_path / "a.parquet"], tmp_path / "o", on_error="skip")
    assert result.skipped == {"not UTF-8": 1}
    documents = [["good"], ["fox"]]
    expected = reference_dataset(tmp_path / "r", documents, model=model, append_eod=False)
    assert same_files(result.prefixes[0], expected)


@pytest.mark.parametrize(
    ("name", "on_error"),
    [("a.jsonl.gz", "fail"), ("a.jsonl.zst", "fail"), ("a.parquet", "fail"), ("a.parquet", "skip")],
)
def test_truncated_file_is_an_error(tmp_path, model, name, on_error):
    path = write_as(tmp_path / name, make_texts(60))
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataError, match=f"{name} cannot be read"):
        run(model, [path], tmp_path / "o", on_error=on_error)
    assert [p.name for p in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst"])
def test_a_compressed_file_of_no_bytes_is_an_error(tmp_path, model, name):
    good = write_as(tmp_path / "good.jsonl", ["text"])
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(DataError, match=f"{name} cannot be read: .*found an empty file"):
        run(model, [good, tmp_path / name], tmp_path / "o")


def test_what_the_manifest_names_is_looked_up_before_the_run(tmp_path, model, monkeypatch):
    """Not after hours, when an input may be gone; and a tokenizer without a digest is refused at once."""
    source = write_as(tmp_path / "a.jsonl", make_texts(5))
    size, encode_in_order = source.stat().st_size, preprocess.encode_in_order

    def encode_and_remove(*args, **options):
        yield from encode_in_order(*args, **options)
        source.unlink()

    monkeypatch.setattr(preprocess, "encode_in_order", encode_and_remove)
    (found,) = run(model, [source], tmp_path / "o").manifests[0].sources
    assert (found.path, found.bytes) == (str(source), size)

    def no_digest(spec):
        raise ConfigError("no vocabulary file")

    monkeypatch.setattr(preprocess, "tokenizer_digest", no_digest)
    write_as(source, make_texts(5))
    with pytest.raises(ConfigError, match="no vocabulary file"):
        run(model, [source], tmp_path / "p")
    assert source.exists()


def test_a_file_name_need_not_be_utf8(tmp_path, model):
    source = write_as(tmp_path / os.fsdecode(b"caf\xe9.jsonl"), ["text"])
    (prefix,) = run(model, [source], tmp_path / "o").prefixes
    assert [found.path for found in read_manifest(prefix).sources] == [str(source)]


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.txt"])
def test_a_document_beyond_all_sizes_is_an_error(tmp_path, model, name, monkeypatch):
    """Not a process that is killed for its memory: as a large array of JSON in one line would be."""
    monkeypatch.setattr(documents, "BLOCK_BYTES", 64)
    monkeypatch.setattr(documents, "_RECORD_BYTES", 640)
    assert run(model, [write_as(tmp_path / name, ["a" * 600])], tmp_path / "o").text_bytes >= 600
    write_as(tmp_path / name, ["a" * 800])
    with pytest.raises(
        DataError, match=rf"{name}.*: expected a document of at most .* found a longer"
    ):
        run(model, [tmp_path / name], tmp_path / "p")


@pytest.mark.parametrize(
    ("unit", "text", "place"),
    [("line", "b\n" + "a" * 800 + "\n", 2), ("paragraph", "b\n\n" + "a b c d\n" * 100, 3)],
)
def test_a_line_or_paragraph_beyond_all_sizes_is_an_error(
    tmp_path, model, unit, text, place, monkeypatch
):
    monkeypatch.setattr(documents, "_RECORD_BYTES", 640)
    (tmp_path / "a.txt").write_text(text)
    with pytest.raises(DataError, match=rf"a\.txt:{place}: expected a document of at most"):
        run(model, [tmp_path / "a.txt"], tmp_path / "o", text_unit=unit)


def test_no_tokens_is_an_error(tmp_path, model):
    (tmp_path / "none.jsonl").write_bytes(b"")
    empty = write_jsonl(tmp_path / "empty.jsonl", [{"text": ""}, {"text": ""}])
    with pytest.raises(DataError, match=r"no tokens for key 'text': 0 documents"):
        run(model, [tmp_path / "none.jsonl"], tmp_path / "o")
    with pytest.raises(DataError, match=r"no tokens for key 'text': 2 documents"):
        run(model, [empty], tmp_path / "o", append_eod=True)
    assert not list(tmp_path.glob("o_*"))


def test_settings_that_cannot_work(tmp_path, model):
    source = write_jsonl(tmp_path / "a.jsonl", [{"text": "a"}])
    (tmp_path / "a.csv").write_text("x")
    os.mkfifo(tmp_path / "pipe.jsonl")
    (tmp_path / "a.txt").write_text("x")
    for inputs, options, message in [
        ([tmp_path / "no*.jsonl"], {}, "no such file"),
        ([source, source], {}, "twice"),
        ([tmp_path / "a.csv"], {}, "--input-format"),
        ([tmp_path / "pipe.jsonl"], {}, "regular file"),
        ([source], {"workers": 0}, "--workers"),
        ([source], {"keys": ["a", "a"]}, "--json-keys"),
        ([tmp_path / "a.txt"], {"keys": ["a", "b"]}, "plain text has no keys"),
        ([source], {"text_unit": "line"}, "--text-unit line: expected plain text .* found records"),
    ]:
        with pytest.raises(ConfigError, match=message):
            run(model, inputs, tmp_path / "o", **options)
    (tmp_path / "folder").mkdir()  # of the text, say: its name may begin those of the outputs
    assert run(model, [source], tmp_path / "folder").prefixes == [
        f"{tmp_path}/folder_text_document"
    ]
    for prefix in (f"{tmp_path}/folder/", f"{tmp_path}/new/"):
        with pytest.raises(
            ConfigError, match=rf"--output-prefix: .* found the folder {prefix} alone"
        ):
            run(model, [source], prefix)
    with pytest.raises(ConfigError, match="no such file"):
        run(str(tmp_path / "none.model"), [source], tmp_path / "o")
    with pytest.raises(ConfigError, match="not a SentencePiece model"):
        run(source, [source], tmp_path / "o")
    no_eos = train_sentencepiece(tmp_path / "no_eos.model", eos_id=-1)
    with pytest.raises(ConfigError, match="no end-of-document"):
        run(no_eos, [source], tmp_path / "o", append_eod=True)
    assert not list(tmp_path.glob("o_*"))


def test_ids_outside_the_vocabulary_are_an_error(tmp_path, model, monkeypatch):
    source = write_jsonl(tmp_path / "a.jsonl", [{"text": "the quick fox"}])
    monkeypatch.setattr("sentencepiece.SentencePieceProcessor.vocab_size", lambda self: 5)
    with pytest.raises(DataError, match=r"outside its own vocabulary of 5 pieces"):
        run(model, [source], tmp_path / "o", backend="reference")


def test_mismatch_during_the_run_starts_over(tmp_path, model, monkeypatch, caplog):
    """A difference outside the sample: found by the checks of the run, whatever was written by then."""
    monkeypatch.setattr(documents, "BLOCK_BYTES", 4096)
    monkeypatch.setattr(encode, "VERIFIED_SHARE", 1.0)
    exact = fast_tokenizer.FastTokenizer._encode_fast

    def broken(self, texts):
        ids, bounds = exact(self, texts)
        return (ids, bounds) if "poison" not in texts else (ids[::-1].copy(), bounds)

    monkeypatch.setattr(fast_tokenizer.FastTokenizer, "_encode_fast", broken)
    texts = [*make_texts(1500), "poison", *make_texts(5)]
    source = write_jsonl(tmp_path / "a.jsonl", [{"text": text} for text in texts])
    with pytest.raises(DataError, match="gigatoken's ids differ"):
        run(model, [source], tmp_path / "g", backend="gigatoken")
    result = run(model, [source], tmp_path / "o")
    assert "starting over with the reference tokenizer" in caplog.text
    assert result.manifests[0].backend == "reference"
    expected = reference_dataset(
        tmp_path / "r", [[t] for t in texts], model=model, append_eod=False
    )
    assert same_files(result.prefixes[0], expected)
    assert not list(tmp_path.glob("g_*"))


def test_tool_reports_in_one_line(tmp_path, model):
    source = write_jsonl(tmp_path / "a.jsonl", [{"text": "the quick"}, {"txt": "x"}])
    process = tool(model, [source], tmp_path / "o", "--workers", "1")
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 2
    assert stderr.splitlines()[-1].startswith(
        f"preprocess_data.py: error: {source}:2: no key 'text'"
    )
    assert "Traceback" not in stderr
    process = tool(model, [source], tmp_path / "o", "--workers", "1", "--on-error", "skip")
    stdout, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    assert "1 documents" in stdout
    assert "skipped 1: no key 'text'" in stdout
