"""Structural tokens that were planted, the draw of documents, and what a user can get wrong."""

import json
import sys
import tracemalloc

import numpy as np
import pytest
from matplotlib.figure import Figure

from megatron_ext.analysis.samples import check_samples, describe_dataset, parse_sets, read_samples
from megatron_ext.analysis.token_report import token_panels
from megatron_ext.analysis.tokens import count_tokens, density, find_overuse
from megatron_ext.exceptions import ConfigError, DataError, MegatronExtError
from tests.helpers.text import train_sentencepiece, write_dataset
from tools.analyze import main

VOCAB, END = 400, 2
PLANTED, ABSENT, BURSTY = 150, 320, 40


def documents(rng, *, planted, absent=0, bursts=0, count=400, length=80):
    """Documents of evenly spread tokens; `planted` and `absent` occurrences in each, bursts in a few."""
    texts = []
    ordinary = np.setdiff1d(np.arange(4, VOCAB), [ABSENT])
    for number in range(count):
        text = rng.choice(ordinary, size=length)
        places = rng.permutation(length)
        text[places[:planted]] = PLANTED
        text[places[planted : planted + absent]] = ABSENT
        if number < bursts:
            text[places[planted + absent :][:60]] = BURSTY
        texts.append(np.append(text, END).tolist())
    return texts


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """Prefixes of real text, of text with planted tokens, and of real text again; a tokenizer."""
    folder = tmp_path_factory.mktemp("sets")
    rng = np.random.default_rng(5)
    planted = documents(rng, planted=8, absent=2, bursts=12)
    return {
        "real": write_dataset(folder / "real", documents(rng, planted=1)),
        "planted": write_dataset(folder / "planted", planted),
        "again": write_dataset(folder / "again", documents(rng, planted=1)),
        "tokenizer": train_sentencepiece(folder / "t.model"),
    }


def counted(prefix):
    samples = read_samples(prefix, count=1000, length=1000, seed=1)
    return count_tokens(samples, vocab_size=VOCAB, special=[END], name="x")


def test_planted_tokens_are_found_and_measured(sets):
    real, planted = counted(sets["real"]), counted(sets["planted"])
    found = {item.token: item for item in find_overuse(planted, real, bandwidth=1.0, seed=1)}
    assert {token for token, item in found.items() if item.structural} == {PLANTED, ABSENT}
    item = found[PLANTED]
    assert (item.count, item.baseline_count) == (
        planted.counts[PLANTED],
        real.counts[PLANTED],
    )
    naive = (np.concatenate(planted.samples) == PLANTED).mean()
    naive /= (np.concatenate(real.samples) == PLANTED).mean()
    assert item.ratio == pytest.approx(naive, rel=2e-3)  # half an occurrence is added to each count
    assert item.low < naive < item.high
    # Of 80 tokens 8 against 1, and each of the others that remain is one in 395.
    assert naive == pytest.approx((8 + 70 / 395) / (1 + 79 / 395), rel=0.1)
    assert item.documents == 1.0
    # What the baseline never has is over-used by a finite factor, with an interval that stays above it.
    assert found[ABSENT].baseline_count == 0
    assert 100 < found[ABSENT].low < found[ABSENT].ratio < found[ABSENT].high
    # What a few documents repeat is over-used as well, but it is their topic.
    assert found[BURSTY].ratio > 2
    assert not found[BURSTY].structural


def test_a_set_of_the_same_kind_has_none(sets):
    found = find_overuse(counted(sets["again"]), counted(sets["real"]), bandwidth=1.0, seed=1)
    assert found
    assert not any(item.structural for item in found)
    covered = sum(item.low < 1 < item.high for item in found)
    assert covered > 0.5 * len(found)  # the largest of 396 random differences, not random ones


def test_density_is_a_naive_kernel_sum(sets):
    rates = counted(sets["planted"]).rates
    smooth = density(rates, bandwidth=3.0)
    assert smooth.sum() == pytest.approx(1.0)
    ids = np.arange(VOCAB)
    at = 200  # away from the ends
    kernel = np.exp(-0.5 * ((ids - at) / 3.0) ** 2) / (3.0 * np.sqrt(2 * np.pi))
    assert smooth[at] == pytest.approx((rates * kernel).sum(), rel=1e-4)  # cut at 5 deviations


def test_draw(sets, tmp_path):
    texts = [[n, n + 1, n + 2] if n % 4 else [] for n in range(4, 204)]
    prefix = write_dataset(tmp_path / "numbered", texts)
    everything = read_samples(prefix, count=1000, length=2, seed=1)
    assert [sample.tolist() for sample in everything] == [text[:2] for text in texts if text]
    drawn = [sample[0] for sample in read_samples(prefix, count=40, length=9, seed=1)]
    assert 20 < len(drawn) <= 40  # a quarter of the documents is empty
    assert drawn == sorted(set(drawn))
    assert drawn == [sample[0] for sample in read_samples(prefix, count=40, length=9, seed=1)]
    assert drawn != [sample[0] for sample in read_samples(prefix, count=40, length=9, seed=2)]


def test_a_draw_makes_no_list_of_all_documents(tmp_path):
    prefix = str(write_dataset(tmp_path / "many", [[7]] * 50_000))
    tracemalloc.start()
    assert len(read_samples(prefix, count=20, length=9, seed=1)) == 20
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 100_000  # two bytes a document


def test_documents_of_several_sequences(tmp_path):
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(f"{tmp_path}/x.bin", dtype=np.int32)
    builder.add_document([5, 6, 7, 8, 9], [2, 3])
    builder.add_document([1], [1])
    builder.finalize(f"{tmp_path}/x.idx")
    whole, short = (read_samples(f"{tmp_path}/x", count=9, length=n, seed=1) for n in (9, 4))
    assert [sample.tolist() for sample in whole] == [[5, 6, 7, 8, 9], [1]]
    assert [sample.tolist() for sample in short] == [[5, 6, 7, 8], [1]]


def test_content_has_a_hash(sets, tmp_path):
    texts = [[5, 6, 7], [8, 9]]
    first = describe_dataset(write_dataset(tmp_path / "a", texts))
    same = describe_dataset(write_dataset(tmp_path / "b", texts))
    other = describe_dataset(write_dataset(tmp_path / "c", [[5, 6, 7], [8, 10]]))
    assert first["sampled_sha256"] == same["sampled_sha256"] != other["sampled_sha256"]
    assert (first["documents"], first["tokens"]) == (2, 5)
    assert first["content_sha256"] is None  # there is no manifest


def analyze(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["analyze.py", "tokens", *map(str, arguments)])
    main()


def test_command(sets, tmp_path, monkeypatch, capsys):
    output = tmp_path / "tokens.json"
    data = [f"{name}={sets[name]}" for name in ("real", "planted", "again")]
    analyze(
        monkeypatch,
        *("--data", *data, "--tokenizer-model", sets["tokenizer"], "--output", output),
        *("--samples", 300),
    )
    printed = capsys.readouterr().out
    assert "planted (300 documents, 24,000 tokens) against real" in printed
    assert "2 structural tokens" in printed
    assert "0 structural tokens" in printed
    report = json.loads(output.read_text())
    tokens = [token for token in report["overuse"]["planted"]["tokens"] if token["structural"]]
    assert {token["token"] for token in tokens} == {PLANTED, ABSENT}
    share = sum(token["count"] for token in tokens) / 24000
    assert report["overuse"]["planted"]["structural_share"] == pytest.approx(share)
    assert all(token["piece"] in printed for token in tokens)
    assert printed.splitlines()[-1] == f"{output}, {output.with_suffix('.png')}"
    assert report["sets"]["real"]["data"] == describe_dataset(sets["real"])
    assert output.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_picture_and_help_agree_on_the_kernel(monkeypatch, capsys):
    axis = Figure().subplots()
    curve = {"density": [0.0, 1.0, 0.0]}
    report = {"baseline": "real", "grid": [0, 1, 2], "sets": {"real": curve, "qa": curve}}
    report |= {"overuse": {"qa": {"tokens": []}}, "drawn_bandwidth": 4096 / 250}
    draw, _ = token_panels(report | {"settings": {"bandwidth": 1.0}})
    draw(axis)
    assert axis.get_xlabel() == (
        "token id (drawn with a kernel of 16.4 ids; peaks are found with 1)"
    )
    with pytest.raises(SystemExit):
        analyze(monkeypatch, "--help")
    said = " ".join(capsys.readouterr().out.split())
    assert (
        "kernel density that finds peaks (default 1.0); pictures are drawn with one of 1/250"
        in said
    )


def test_bad_inputs(sets, tmp_path, monkeypatch):
    output = tmp_path / "tokens.json"
    good = ("--tokenizer-model", sets["tokenizer"], "--output", output)
    real = f"real={sets['real']}"
    cases = {
        "expected at least two sets": ("--data", real, *good),
        "nowhere.idx is missing": ("--data", real, f"x={tmp_path}/nowhere", *good),
        "expected one of real, x, found y": (
            *("--data", real, f"x={sets['planted']}", *good),
            *("--baseline", "y"),
        ),
        "expected more than 0, found 0": ("--data", real, *good, "--samples", 0),
    }
    for message, arguments in cases.items():
        with pytest.raises(MegatronExtError, match=message):
            analyze(monkeypatch, *arguments)
    assert not output.exists()


def test_words_that_name_no_set():
    for words in (["real"], ["=x"], ["x="], ["x=a", "x=b"]):
        with pytest.raises(ConfigError, match="--data"):
            parse_sets(words)


def test_ids_of_another_tokenizer(tmp_path):
    samples = [np.array([5, VOCAB])]
    with pytest.raises(DataError, match=f"expected token ids below {VOCAB}"):
        count_tokens(samples, vocab_size=VOCAB, special=[END], name="x")
    with pytest.raises(DataError, match="at least 2 documents"):
        count_tokens([np.array([END])], vocab_size=VOCAB, special=[END], name="x")


def test_too_few_samples():
    with pytest.raises(DataError, match="--data x: expected at least 3 samples with text, found 2"):
        check_samples({"x": [np.array([1])] * 2}, minimum=3)
