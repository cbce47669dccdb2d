"""Full checks of tokenised data, and documents that two data sets share."""

import dataclasses
import hashlib
import json
import subprocess
import sys
from argparse import Namespace
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest

from megatron_ext.config import UnlearnConfig
from megatron_ext.data import verify as verify_module
from megatron_ext.data.manifest import manifest_path, read_manifest, write_manifest
from megatron_ext.data.overlap import check_overlap, find_shared, shared_content
from megatron_ext.data.preprocess import PreprocessConfig, preprocess
from megatron_ext.data.shared_documents import find_overlaps
from megatron_ext.data.tokenizers import TokenizerSpec
from megatron_ext.data.verify import verify
from megatron_ext.exceptions import DataError
from tests.helpers.entry import ROOT
from tests.helpers.text import make_texts, train_sentencepiece, write_jsonl

TEXTS = [text for text in make_texts(80) if len(text) > 200][:40]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Data sets made by preprocessing, by name: their prefixes."""
    folder = tmp_path_factory.mktemp("data")
    spec = TokenizerSpec(
        tokenizer_type="SentencePieceTokenizer",
        tokenizer_model=train_sentencepiece(folder / "t.model"),
    )
    prefixes = {}
    parts = {"all": TEXTS, "first": TEXTS[:20], "last": TEXTS[20:], "again": TEXTS}
    for name, texts in (parts | {"ended": TEXTS[:20]}).items():
        source = write_jsonl(folder / f"{name}.jsonl", [{"text": text} for text in texts])
        result = preprocess(
            PreprocessConfig(
                inputs=[source],
                output_prefix=str(folder / name),
                tokenizer=spec,
                append_eod=name == "ended",
            )
        )
        prefixes[name] = result.prefixes[0]
    return prefixes


@pytest.fixture
def copy(made, tmp_path):
    """A copy of one that a test may break."""
    for suffix in (".bin", ".idx", ".manifest.json"):
        (tmp_path / f"c{suffix}").write_bytes(Path(f"{made['all']}{suffix}").read_bytes())
    return str(tmp_path / "c")


def shared(first, second, **settings):
    [[found]] = find_overlaps([first], [second], **settings)
    return found


def change(path, at, data):
    content = bytearray(Path(path).read_bytes())
    content[at : at + len(data)] = data
    Path(path).write_bytes(content)


def test_what_preprocessing_writes_is_right(made):
    found = verify(made["all"])
    assert found.has_digest
    assert found.summary.documents == 40
    content = Path(f"{made['all']}.bin").read_bytes() + Path(f"{made['all']}.idx").read_bytes()
    assert read_manifest(made["all"]).content_digest == hashlib.sha256(content).hexdigest()


def test_blocks_of_any_size_give_the_same(made, monkeypatch):
    expected = verify(made["all"])
    monkeypatch.setattr(verify_module, "_BLOCK", 64)
    monkeypatch.setattr(verify_module, "_ENTRIES", 3)
    assert verify(made["all"]) == expected


def test_a_flipped_bit_anywhere_is_found(copy):
    """Within the vocabulary and the right size: nothing but the digest, or the largest id, can tell."""
    content = Path(f"{copy}.bin").read_bytes()
    for at in (0, len(content) // 2 & ~1, len(content) - 2):
        change(f"{copy}.bin", at, bytes([content[at] ^ 1]))
        with pytest.raises(
            DataError, match=r"c\.manifest\.json: expected (content_digest|max_token_id)"
        ):
            verify(copy)
        Path(f"{copy}.bin").write_bytes(content)
    verify(copy)


def test_ids_outside_the_vocabulary_are_placed(copy):
    change(f"{copy}.bin", 2 * 77, np.uint16(60000).tobytes())
    with pytest.raises(DataError, match=r"c\.bin: expected ids .*, found 60000 at token 77"):
        verify(copy)
    manifest_path(copy).unlink()
    with pytest.raises(DataError, match=r"c\.bin: expected ids from 0 to 500 - 1.*found 60000"):
        verify(copy, vocab_size=500)
    assert verify(copy).largest == 60000


@pytest.mark.parametrize(
    ("field", "at", "value", "message"),
    [
        ("length", 34 + 4 * 5, np.int32(3), "sequence 6 has .* from byte"),
        ("zero length", 34, np.int32(0), "sequence 0 has 0 tokens"),
        ("offset", 34 + 4 * 40 + 8 * 7, np.int64(1), "sequence 7 has .* from byte 1,"),
        ("boundary", 34 + 12 * 40 + 8 * 9, np.int64(3), "document 9 begins before"),
        ("first boundary", 34 + 12 * 40, np.int64(1), "document 0 begins before"),
    ],
)
def test_a_broken_index_is_placed(copy, field, at, value, message):
    """The ends, which training looks at, are right."""
    change(f"{copy}.idx", at, value.tobytes())
    with pytest.raises(DataError, match=rf"c\.idx is broken: {message}"):
        verify(copy)


@pytest.mark.parametrize("field", ["documents", "tokens", "dtype"])
def test_another_manifest_is_refused(copy, field):
    fields = json.loads(manifest_path(copy).read_text())
    fields[field] = "int32" if field == "dtype" else fields[field] + 1
    manifest_path(copy).write_text(json.dumps(fields))
    with pytest.raises(DataError, match=f"c.manifest.json: expected {field}"):
        verify(copy, vocab_size=fields["vocab_size"])


def test_another_tokenizer_is_told_from_that_of_the_data(copy):
    pieces = read_manifest(copy).vocab_size
    made = r"c\.manifest\.json: the data were made with SentencePieceTokenizer t\.model"
    with pytest.raises(DataError, match=rf"{made} of {pieces} .* the tokenizer given has 3000$"):
        verify(copy, vocab_size=3000)
    with pytest.raises(DataError, match=rf"{made} \(SHA-256 .* given is another one \(another"):
        verify(copy, vocab_size=pieces, tokenizer_digest="another")


def test_ids_of_two_tokenizers_are_not_compared(made, copy):
    fields = dataclasses.replace(read_manifest(copy), tokenizer_digest="another")
    write_manifest(copy, fields, overwrite=True)
    with pytest.raises(DataError, match=r"c\.manifest\.json: expected data of the tokenizer of"):
        find_overlaps([made["first"]], [made["last"], copy])


def test_texts_with_bos_are_not_compared_with_those_without(made, copy, tmp_path):
    fields = read_manifest(copy)
    assert (fields.before_text, fields.after_text) == ([], [])
    write_manifest(copy, dataclasses.replace(fields, before_text=[1]), overwrite=True)
    message = r"c\.manifest\.json: expected ids \[\] before each text as in .*, found \[1\]"
    with pytest.raises(DataError, match=message):
        find_overlaps([made["first"]], [made["last"], copy])
    unlike = (
        r"first_.*: expected ids \[1\] .* as in .*with_bos, found \[\]: .*--allow-data-overlap runs"
    )
    with_bos = str(tmp_path / "with_bos")
    for suffix in (".bin", ".idx"):
        Path(f"{with_bos}{suffix}").write_bytes(Path(f"{made['last']}{suffix}").read_bytes())
    last = read_manifest(made["last"])
    for before, refused in (
        ([1], True),
        ([], False),
        (None, False),
    ):  # the last as in older manifests
        write_manifest(with_bos, dataclasses.replace(last, before_text=before), overwrite=True)
        args, config = arguments(made | {"with_bos": with_bos}, "first", "with_bos")
        with pytest.raises(DataError, match=unlike) if refused else nullcontext():
            check_overlap(args, config)


def test_an_end_of_document_hides_no_shared_text(made, tmp_path):
    """Made with --append-eod and without, with a manifest and, as by stock Megatron-LM, without one."""
    ended, bare = made["ended"], made["first"]
    with pytest.raises(DataError, match="found 20 of 20 sampled documents as in"):
        check_overlap(*arguments(made, "first", "ended"))
    stock = {}
    for prefix in (ended, bare):
        stock[prefix] = str(tmp_path / Path(prefix).name)
        for suffix in (".bin", ".idx"):
            Path(f"{stock[prefix]}{suffix}").write_bytes(Path(f"{prefix}{suffix}").read_bytes())
    for first, second in ((bare, ended), (stock[bare], ended), (bare, stock[ended])):
        assert shared(first, second).documents == 20
    eod_id = read_manifest(ended).eod_id
    assert shared(stock[bare], stock[ended], eod_id=eod_id).documents == 20
    assert shared(made["last"], ended).documents == 0
    assert shared(made["last"], bare).documents == 0


def arguments(made, forget, replay, **fields):
    config = UnlearnConfig(forget_data_path=["1", made[forget]], **fields)
    args = Namespace(
        data_path=[made[replay]],
        data_args_path=None,
        per_split_data_args_path=None,
        **dict.fromkeys(("train_data_path", "valid_data_path", "test_data_path"), None),
    )
    return args, config


@pytest.mark.parametrize(
    ("forget", "replay", "found"),
    [
        ("all", "all", "the same file"),
        ("all", "again", "the same content"),
        ("first", "all", "20 of 20 sampled documents"),
    ],
)
def test_text_that_is_forgotten_and_replayed_is_refused(made, forget, replay, found):
    with pytest.raises(DataError, match=f"--forget-data-path .*, found {found} as in .*{replay}"):
        check_overlap(*arguments(made, forget, replay))
    check_overlap(*arguments(made, forget, replay, allow_data_overlap=True))


def test_disjoint_text_passes(made):
    check_overlap(*arguments(made, "first", "last"))
    check_overlap(arguments(made, "all", "all")[0], UnlearnConfig())


def test_a_manifest_of_an_earlier_version_says_less(made):
    manifest = read_manifest(made["all"])
    old = dataclasses.replace(manifest, content_digest=None, document_sample=None)
    assert shared_content("a", old, "b", old) is None
    assert shared_content("a", None, "b", manifest) is None
    assert shared_content("a", old, "./a", None) == "the same file"


def test_many_data_sets_are_compared_as_each_pair_is(made, tmp_path):
    """Manifests of ten digests out of a hundred; some sides share nothing."""
    random = np.random.default_rng(5)
    manifest, found = read_manifest(made["all"]), 0

    def side(name, low, high):
        prefixes = [str(tmp_path / f"{name}{i}") for i in range(6)]
        for prefix in prefixes:
            drawn = sorted(random.choice(np.arange(low, high), 10, replace=False).tolist())
            digests = [f"{number:016x}" for number in drawn]
            content = str(random.integers(0, 30))
            fields = {"document_sample": digests, "content_digest": content}
            write_manifest(prefix, dataclasses.replace(manifest, **fields), overwrite=True)
        return prefixes

    for low in (0, 100, 80, 80, 80):
        forgotten, replayed = side("forget", 0, 100), side("replay", low, low + 100)
        pairs = [
            (a, b, shared_content(a, read_manifest(a), b, read_manifest(b)))
            for a in forgotten
            for b in replayed
        ]
        expected = next((pair for pair in pairs if pair[2] is not None), None)
        assert find_shared(forgotten, replayed) == expected
        found += expected is not None
    assert 0 < found < 5


def test_the_tool_checks_all_and_says_which_are_bad(made, copy, tmp_path):
    change(f"{copy}.bin", 0, np.uint16(60000).tobytes())
    command = [sys.executable, str(ROOT / "tools" / "verify_data.py")]

    def tool(*words):
        return subprocess.run([*command, *words], capture_output=True, text=True)

    result = tool(copy, made["first"], "--against", made["all"])
    assert result.returncode == 2
    lines = result.stdout.splitlines()
    assert lines[0].startswith(f"BAD {copy}.bin: expected ids")
    assert lines[1].startswith(f"ok  {made['first']}: 20 documents")
    assert result.stderr == "verify_data.py: error: 1 checks failed, see above\n"
    result = tool(made["first"], "--against", made["all"], made["last"])
    assert result.returncode == 2
    assert f"BAD {made['all']}: 20 documents (20 distinct) are in {made['first']}" in result.stdout
    assert f"ok  {made['last']} shares no document with {made['first']}" in result.stdout
    # A data set to compare with is looked for before anything is read.
    result = tool(made["first"], "--against", made["last"], f"{copy}x")
    assert (result.returncode, result.stdout) == (2, "")
    assert f"{copy}x.idx is missing" in result.stderr
    # Questions: some stand in the data, cut out of their documents, some do not.
    inside = [" ".join(text.split(" ")[3:40]) for text in TEXTS[:3]]
    questions = [*inside, "short", " ".join(TEXTS[30].split(" ")[3:40])]
    lines = [{"question": text, "answer": TEXTS[0]} for text in questions]
    file = write_jsonl(tmp_path / "test.jsonl", lines)
    model = str(Path(made["first"]).with_name("t.model"))
    spec = ("--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", model)
    result = tool(made["first"], made["last"], "--benchmark", file, *spec)
    assert result.returncode == 2
    for line, name, known in zip(
        result.stdout.splitlines()[2:],
        ("first", "last"),
        ("3 (1, 2, 3 among them)", "1 (5 among them)"),
        strict=True,
    ):
        assert line.startswith(f"BAD {file}: of 5 texts {known} stand in {made[name]} by 80% of")
        assert line.endswith("; 1 are too short to tell")
    for words, message in (
        ((), "--benchmark: expected --tokenizer-type and --tokenizer-model beside it"),
        ((*spec, "--benchmark-keys", "text"), f"--benchmark {file}:1: no key 'text'"),
    ):
        result = tool(made["first"], "--benchmark", file, *words)
        assert result.returncode == 2
        assert f"error: {message}" in result.stderr
    # As a shell completes them.
    assert tool(f"{made['first']}.idx", "--against", f"{made['last']}.bin").returncode == 0
