"""Joined data sets are those of one run over all inputs, to the byte; what does not fit is refused."""

import dataclasses
import random
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from megatron_ext.data import document_digests, manifest, merge
from megatron_ext.data.indexed import IndexedWriter
from megatron_ext.data.manifest import manifest_path, read_manifest, write_manifest
from megatron_ext.data.preprocess import PreprocessConfig, preprocess
from megatron_ext.data.tokenizers import TokenizerSpec
from megatron_ext.data.verify import verify
from megatron_ext.exceptions import ConfigError, DataError
from tests.helpers.text import make_texts, train_sentencepiece, write_jsonl
from tools import merge_data

SUFFIXES = (".bin", ".idx", ".manifest.json")


def records(seed):
    """Documents of no, one and several sequences, a few of them empty, and a record that is left out."""
    rng, texts = random.Random(seed), make_texts(60, seed=seed)
    lists = [[texts.pop() for _ in range(rng.randint(0, min(3, len(texts))))] for _ in range(20)]
    return [
        *({"text": each} for each in lists),
        {"text": seed},
        *({"text": each} for each in texts),
    ]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Three data sets, and one of all their inputs: prefixes."""
    folder = tmp_path_factory.mktemp("data")
    model = train_sentencepiece(folder / "t.model")
    spec = TokenizerSpec(tokenizer_type="SentencePieceTokenizer", tokenizer_model=model)
    inputs = [write_jsonl(folder / f"{seed}.jsonl", records(seed)) for seed in range(3)]

    def run(name, chosen):
        config = PreprocessConfig(
            inputs=chosen,
            output_prefix=str(folder / name),
            tokenizer=spec,
            append_eod=True,
            on_error="skip",
            backend="reference",
        )
        return preprocess(config).prefixes[0]

    with pytest.MonkeyPatch.context() as patch:
        # Fewer than there are documents in any of them.
        patch.setattr(document_digests, "SAMPLED_DOCUMENTS", 9)
        return [run(f"s{i}", [path]) for i, path in enumerate(inputs)], run("all", inputs)


@pytest.fixture
def parts(made, tmp_path):
    """Copies of the three that a test may break."""
    for number, prefix in enumerate(made[0]):
        for suffix in SUFFIXES:
            (tmp_path / f"p{number}{suffix}").write_bytes(Path(f"{prefix}{suffix}").read_bytes())
    return [str(tmp_path / f"p{number}") for number in range(3)]


def files(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


@pytest.mark.parametrize("size", [1 << 25, 7])
def test_joined_data_are_those_of_one_run(made, tmp_path, size, monkeypatch):
    monkeypatch.setattr(manifest, "SAMPLED_DOCUMENTS", 9)
    monkeypatch.setattr(merge, "_BLOCK", size)
    monkeypatch.setattr(merge, "_ENTRIES", size)
    copied = []
    merged = merge.merge(made[0], str(tmp_path / "o"), advance=copied.append)
    for suffix in SUFFIXES:
        assert (tmp_path / f"o{suffix}").read_bytes() == Path(f"{made[1]}{suffix}").read_bytes()
    assert sum(copied) == (tmp_path / "o.bin").stat().st_size
    assert verify(tmp_path / "o").summary == merged.summary
    assert merged.summary.sequences > merged.summary.documents
    assert list(read_manifest(tmp_path / "o").skipped.values()) == [3]
    # In another order they are other data.
    merge.merge(made[0][::-1], str(tmp_path / "o"), overwrite=True)
    assert verify(tmp_path / "o").has_digest
    assert (tmp_path / "o.bin").read_bytes() != Path(f"{made[1]}.bin").read_bytes()


def test_data_of_stock_megatron_are_joined_without_a_manifest(
    made, parts, tmp_path, capsys, monkeypatch
):
    for prefix in parts:
        manifest_path(prefix).unlink()
    words = ["--output", f"{tmp_path}/new/o", *(f"{prefix}.idx" for prefix in parts)]
    monkeypatch.setattr("sys.argv", ["merge_data.py", *words])
    merge_data.main()
    for suffix in SUFFIXES[:2]:
        assert (
            Path(f"{tmp_path}/new/o{suffix}").read_bytes()
            == Path(f"{made[1]}{suffix}").read_bytes()
        )
    assert len(files(tmp_path / "new")) == 2
    found = read_manifest(made[1])
    assert capsys.readouterr().out == (
        f"{tmp_path}/new/o: 3 data sets, {found.documents} documents, {found.tokens:,} tokens (uint16); no "
        "manifest, as those that were joined have none\n"
    )
    manifest_path(tmp_path / "new" / "o").touch()
    with pytest.raises(ConfigError, match=r"^--output: .* no manifests, found .*o\.manifest\.json"):
        merge.merge(parts, f"{tmp_path}/new/o", overwrite=True)


def described(**fields):
    def change(prefix):
        changed = dataclasses.replace(read_manifest(prefix), **fields)
        write_manifest(prefix, changed, overwrite=True)

    return change


def edited(suffix, at, data):
    def change(prefix):
        content = bytearray(Path(prefix + suffix).read_bytes())
        content[at : at + len(data)] = data
        Path(prefix + suffix).write_bytes(content)

    return change


def int32(prefix):
    ids = np.fromfile(f"{prefix}.bin", dtype=np.uint16)
    with Path(f"{prefix}.bin").open("wb") as tokens, Path(f"{prefix}.idx").open("wb") as index:
        writer = IndexedWriter(tokens, index, np.dtype(np.int32))
        writer.append(
            ids.astype(np.int32).tobytes(),
            sequence_lengths=np.array([len(ids)], dtype=np.int32),
            document_sequences=np.array([1], dtype=np.int32),
        )
        writer.finish()


def modes(prefix):
    """Multimodal data have a byte more for every sequence."""
    with Path(f"{prefix}.idx").open("ab") as index:
        index.write(bytes(read_manifest(prefix).sequences))


def copied(prefix):
    for suffix in SUFFIXES:
        Path(prefix + suffix).write_bytes(Path(f"{prefix[:-1]}0{suffix}").read_bytes())


BROKEN = {
    r"p1\.manifest\.json: .*\), but that of .*p0 is another one": described(
        tokenizer_digest="another"
    ),
    r"p1\.manifest\.json: the data were made with .* of 9 pieces, but that of .*p0 has": described(
        vocab_size=9
    ),
    r"p1\.manifest\.json: expected append_eod True as in .*p0, found False": described(
        append_eod=False
    ),
    r"p1\.manifest\.json: expected eod_id 2 as in .*p0, found 1": described(eod_id=1),
    r"p1\.manifest\.json: expected chat_template None as in .*p0, found chat": described(
        chat_template="chat.jinja", chat_template_digest="ab"
    ),
    r"p1\.manifest\.json: expected before_text \[\] as in .*p0, found \[1\]": described(
        before_text=[1]
    ),
    r"p1\.manifest\.json: expected after_text \[\] as in .*p0, found \[2\]": described(
        after_text=[2]
    ),
    r"p1\.bin: expected each data set once, found the content of .*p0": copied,
    r"p1\.manifest\.json describes 5 tokens": described(tokens=5),
    r"p1\.manifest\.json is missing: expected manifests of all .* found that of .*p0": (
        lambda prefix: manifest_path(prefix).unlink()
    ),
    r"p1\.idx: expected ids of type uint16 as in .*p0, found int32": int32,
    r"p1\.idx has surplus bytes": modes,
    r"p1\.idx\.partial exists: expected a finished data set": (
        lambda prefix: Path(f"{prefix}.idx.partial").touch()
    ),
    r"p1\.idx is missing": lambda prefix: Path(f"{prefix}.idx").unlink(),
    r"p1\.idx is broken: sequence 0 has 0 tokens": edited(".idx", 34, bytes(4)),
    r"p1\.manifest\.json: expected content_digest .*, as the data have it, found": edited(
        ".bin", 0, bytes(2)
    ),
}


@pytest.mark.parametrize("message", BROKEN)
def test_a_data_set_that_does_not_fit_is_named(parts, tmp_path, message):
    BROKEN[message](parts[1])
    before = files(tmp_path)
    with pytest.raises(DataError, match=message):
        merge.merge(parts, str(tmp_path / "o"))
    assert files(tmp_path) == before


def test_a_data_set_that_is_not_there_lacks_more_than_its_manifest(parts, tmp_path):
    with pytest.raises(DataError, match=r"none\.idx is missing: the data set .*none needs its"):
        merge.merge([parts[0], f"{tmp_path}/none"], str(tmp_path / "o"))
    for kind in (".idx", ".bin"):
        partial = tmp_path / f"none{kind}.partial"
        partial.touch()
        with pytest.raises(DataError, match=f"{partial} exists: expected a finished data set"):
            merge.merge([parts[0], f"{tmp_path}/none"], str(tmp_path / "o"))
        partial.unlink()


def test_of_a_part_of_an_earlier_version_less_is_known(parts, tmp_path):
    described(before_text=None, after_text=None)(parts[1])
    merge.merge(parts, str(tmp_path / "o"))
    assert read_manifest(tmp_path / "o").before_text is None


@pytest.mark.parametrize(
    ("chosen", "output", "message"),
    [
        ([0], "o", r"^expected two data sets to join or more, found .*p0 alone"),
        ([0, 1, 0], "o", r"^.*p0: expected each data set once"),
        ([0, 1], "p2", r"p2\.bin exists: give --overwrite"),
        ([0, 1], "o/", r"^--output: expected a folder and the name of a data set"),
        ([0, 1], "p2.bin/o", r"^--output .*p2\.bin is a file"),
    ],
)
def test_names_that_cannot_work_are_refused(parts, tmp_path, chosen, output, message):
    before = files(tmp_path)
    with pytest.raises(ConfigError, match=message):
        merge.merge([parts[i] for i in chosen], f"{tmp_path}/{output}")
    with pytest.raises(ConfigError, match=r"^--output .*p0: expected a new data set, found .*p0"):
        merge.merge(parts, parts[0], overwrite=True)
    assert files(tmp_path) == before


def test_room_is_looked_for_first(parts, tmp_path, monkeypatch):
    size = sum(Path(prefix + suffix).stat().st_size for prefix in parts for suffix in SUFFIXES[:2])
    monkeypatch.setattr(merge, "free_mib", lambda folder: (size - 1) / 2**20)
    with pytest.raises(ConfigError, match=r"^--output .*/o: expected [\d.]+ MiB free on its disk"):
        merge.merge(parts, str(tmp_path / "o"))
    monkeypatch.setattr(merge, "free_mib", lambda folder: size / 2**20)
    merge.merge(parts, str(tmp_path / "o"))


@pytest.mark.parametrize("calls", [0, 2])
def test_an_interrupted_run_leaves_what_was_there(parts, tmp_path, calls):
    merge.merge(parts[1:], str(tmp_path / "o"))
    before, left = files(tmp_path), [None] * calls

    def stop(_):
        if not left:
            raise KeyboardInterrupt
        left.pop()

    with pytest.raises(KeyboardInterrupt):
        merge.merge(parts, str(tmp_path / "o"), overwrite=True, advance=stop)
    assert files(tmp_path) == before


def test_memory_does_not_grow_with_the_data(tmp_path, monkeypatch):
    """20 MB a data set, in blocks of 256 KiB; the files' buffers are 1 MiB each."""
    count, prefixes = 1 << 18, [str(tmp_path / name) for name in "ab"]
    for prefix in prefixes:
        with Path(f"{prefix}.bin").open("wb") as tokens, Path(f"{prefix}.idx").open("wb") as index:
            writer = IndexedWriter(tokens, index, np.dtype(np.uint16))
            lengths = np.full(count, 32, dtype=np.int32)
            ones = np.ones(count, dtype=np.int32)
            writer.append(bytes(64 * count), sequence_lengths=lengths, document_sequences=ones)
            writer.finish()
    monkeypatch.setattr(merge, "_BLOCK", 1 << 18)
    monkeypatch.setattr(merge, "_ENTRIES", 1 << 15)
    monkeypatch.setattr("megatron_ext.data.verify._ENTRIES", 1 << 15)
    tracemalloc.start()
    merge.merge(prefixes, str(tmp_path / "o"))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 6 << 20
