"""Planned weights against Megatron's own blend; counted samples against a count one by one."""

import json
import shlex
import sys
from argparse import Namespace
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from megatron.core.datasets import helpers
from megatron.core.datasets.utils import get_blend_from_list, normalize

from megatron_ext.data import consumed
from megatron_ext.data.blend import _whole, parse_shares, training_tokens
from megatron_ext.data.composition import ComposedDataset
from megatron_ext.exceptions import ConfigError, DataError
from tests.helpers.text import write_dataset
from tools import plan_blend

LENGTHS = {"qa": [7, 1, 30], "web0": [500, 20, 3, 9], "web1": [40, 60], "code": [333]}


@pytest.fixture
def data(tmp_path):
    """By name, prefixes of data sets of these lengths."""
    return {
        name: write_dataset(tmp_path / name, [np.ones(length, np.int64) for length in lengths])
        for name, lengths in LENGTHS.items()
    }


def tool(monkeypatch, capsys, *words):
    """What the tool prints."""
    monkeypatch.setattr(sys, "argv", ["plan_blend.py", *map(str, words)])
    plan_blend.main()
    return capsys.readouterr().out


def planned(monkeypatch, capsys, data, *more):
    words = ("--seq-length", 10, "--split", "1", "--dataset", "2%", data["qa"])
    words += ("--dataset", "3e6", data["code"], "--dataset", "rest", f"{data['web0']}.idx")
    return tool(monkeypatch, capsys, *words, data["web1"], *more)


def blended(words, size):
    """Megatron's blend of what is written after --data-path: samples of each data set."""
    prefixes, weights = get_blend_from_list(words)
    index, numbers = np.zeros(size, np.int16), np.zeros(size, np.int64)
    helpers.build_blending_indices(index, numbers, normalize(weights), len(prefixes), size, False)
    return prefixes, index


def test_the_blend_of_the_printed_words_has_the_shares(data, monkeypatch, capsys):
    numbers = json.loads(planned(monkeypatch, capsys, data, "--tokens", "1e7", "--json"))
    side = numbers["roles"]["learn"]
    assert numbers["samples"] == side["samples"] == 1_000_000
    prefixes, index = blended(side["words"], 1_000_000)
    assert prefixes == [data[name] for name in ("qa", "code", "web0", "web1")]
    found = np.bincount(index, minlength=4)
    assert np.abs(found - [row["samples"] for row in side["datasets"]]).max() <= 2
    # 2% and 30% of all tokens, the rest by size, so that both are read equally often.
    web = [sum(LENGTHS["web0"]), sum(LENGTHS["web1"])]
    shares = [0.02, 0.3, *(0.68 * n / sum(web) for n in web)]
    assert found / 1e6 == pytest.approx(shares, rel=1e-3)
    tokens = [sum(LENGTHS[name]) for name in ("qa", "code", "web0", "web1")]
    epochs = [row["epochs"] for row in side["datasets"]]
    assert epochs == pytest.approx(
        [s * 1e7 / n for s, n in zip(shares, tokens, strict=True)], rel=1e-4
    )
    assert epochs[2] == pytest.approx(epochs[3], rel=1e-4)
    assert [row["share"] for row in side["sources"]] == pytest.approx([0.02, 0.3, 0.68])


def test_whole_batches_of_both_sides(data, monkeypatch, capsys):
    words = ("--tokens", 1001, "--global-batch-size", 16, "--forget-batch-size", 4)
    words += ("--forget", "100%", data["qa"], "--seq-length", 10, "--split", "1", "--json")
    text = tool(monkeypatch, capsys, *words, "--dataset", "rest", data["code"])
    numbers = json.loads(text)
    assert (numbers["iterations"], numbers["samples"]) == (7, 112)  # 101 samples, rounded up
    forget, replay = (numbers["roles"][role] for role in ("forget", "replay"))
    assert forget["words"] == ["28", data["qa"]]
    assert replay["words"] == ["84", data["code"]]
    assert (forget["flag"], replay["flag"]) == ("--forget-data-path", "--data-path")


def test_numbers_of_tokens_are_of_what_was_asked_for(data, monkeypatch, capsys):
    """Not of the whole batches that it is rounded up to."""
    words = ("--tokens", 1000, "--global-batch-size", 16, "--forget-batch-size", 8, "--json")
    words += ("--seq-length", 10, "--split", "1", "--forget", "500", data["qa"])
    text = tool(
        monkeypatch,
        capsys,
        *words,
        "--dataset",
        "200",
        data["code"],
        "--dataset",
        "300",
        data["web0"],
    )
    roles = json.loads(text)["roles"]
    assert roles["forget"]["words"] == ["56", data["qa"]]
    assert roles["replay"]["words"] == ["22", data["code"], "34", data["web0"]]


def test_text_warns_above_four_epochs(data, monkeypatch, capsys):
    text = planned(monkeypatch, capsys, data, "--tokens", "1e7")
    assert "warning: qa is read 5263.2 times, more than 4" in text
    small = ("--seq-length", 10, "--split", "1", "--tokens", 1000)
    text = tool(monkeypatch, capsys, *small, "--dataset", "rest", data["code"], data["web0"])
    assert "warning" not in text
    assert "code and 1 more" in text
    assert f"--data-path 38 {data['code']} 62 {data['web0']}" in text


def test_words_to_paste_are_quoted_for_a_shell(tmp_path, monkeypatch, capsys):
    prefix = write_dataset(tmp_path / "my data", [np.ones(30, np.int64)])
    small = ("--seq-length", 10, "--split", "1", "--tokens", 30)
    text = tool(monkeypatch, capsys, *small, "--dataset", "rest", prefix)
    assert shlex.split(text.splitlines()[-1]) == ["--data-path", "3", prefix]


@pytest.mark.parametrize("split", ["1", "3,1", "969,30,1", "50,50,0"])
def test_training_tokens_are_those_of_megatrons_split(data, split):
    parts = [float(part) for part in split.split(",")]
    lengths = LENGTHS["web0"]
    end = round(parts[0] / sum(parts) * float(len(lengths)))
    assert training_tokens(data["web0"], split) == sum(lengths[:end])


def test_a_split_without_training_data(data):
    with pytest.raises(ConfigError, match="expected a share for training"):
        training_tokens(data["qa"], "0,1")
    with pytest.raises(DataError, match="found none of its 1 with shares 1,2"):
        training_tokens(data["code"], "1,2")


@pytest.mark.parametrize(
    ("texts", "shares"),
    [(["2%", "rest"], [0.02, 0.98]), (["250", "25%", "rest"], [0.25, 0.25, 0.5])]
    + [(["40%", "60%"], [0.4, 0.6]), (["rest"], [1.0])],
)
def test_shares(texts, shares):
    assert parse_shares(texts, 1000, "--dataset") == pytest.approx(shares)


def test_rounded_percentages_make_a_whole():
    shares = parse_shares(["33.33334%"] * 3, 1000, "--dataset")
    assert sum(_whole([70_000_000 * share for share in shares], 70_000_000)) == 70_000_000


@pytest.mark.parametrize(
    "texts",
    [["rest", "rest"], ["50%"], ["60%", "60%"], ["100%", "rest"], ["2000"], ["-1%"]]
    + [["x"], ["nan%"], ["0"]],
)
def test_what_is_no_whole(texts):
    with pytest.raises(ConfigError, match="--dataset: expected"):
        parse_shares(texts, 1000, "--dataset")


def test_less_than_a_sample(data, monkeypatch, capsys):
    words = ("--seq-length", 10, "--split", "1", "--tokens", 1000, "--dataset", "3", data["qa"])
    with pytest.raises(ConfigError, match=r"at least one sample of 10 tokens for .*qa"):
        tool(monkeypatch, capsys, *words, "--dataset", "rest", data["code"])


def test_a_data_set_in_two_sources(data, monkeypatch, capsys):
    """As where ``data/*.idx`` is the rest of ``data/qa``: its share would be that of two sources."""
    with pytest.raises(
        ConfigError, match=r"--dataset: expected each data set once, found .*qa twice"
    ):
        planned(monkeypatch, capsys, data, data["qa"], "--tokens", "1e7")


@pytest.mark.parametrize("flag", ["--tokens", "--seq-length", "--global-batch-size"])
def test_numbers_of_no_run(data, monkeypatch, capsys, flag):
    good = {"--tokens": "1e4", "--seq-length": "10", "--global-batch-size": "4"}
    for value in ("-8", *(["nan", "inf", "1e30"] if flag == "--tokens" else [])):
        words = [word for pair in (good | {flag: value}).items() for word in pair]
        with pytest.raises(ConfigError, match=f"{flag}: expected a number above 0"):
            tool(monkeypatch, capsys, *words, "--dataset", "rest", data["code"])


def record(start, weights, index, *, size=4000):
    """A part of a plain run."""
    names = [f"d{i}" for i in range(len(weights))]
    blend = {"datasets": names, "weights": weights, "size": size, "index": index}
    return {"start": start, "batch": 16, "forget": 0, "roles": {"learn": blend}}


def count(parts, samples):
    saved = Namespace(consumed_data=parts, consumed_train_samples=samples, seq_length=64)
    return consumed.count(saved, path=Path("c/iter_0000010"))


def test_a_count_over_parts_and_chunks(tmp_path, monkeypatch):
    weights = [normalize(w) for w in ([1, 2, 3], [5, 1, 1])]
    indices = []
    for number, words in enumerate(weights):
        index, numbers = np.zeros(4000, np.int16), np.zeros(4000, np.int64)
        helpers.build_blending_indices(index, numbers, words, 3, 4000, False)
        np.save(tmp_path / f"{number}.npy", index)
        indices.append(index)
    naive = [0, 0, 0]
    for place in range(3210):
        naive[indices[place >= 1600][place]] += 1
    monkeypatch.setattr(consumed, "_CHUNK", 1000)
    for gone in (False, True):  # without the file, the weights say the same
        paths = [None if gone else str(tmp_path / f"{i}.npy") for i in range(2)]
        parts = [record(0, weights[0], paths[0]), record(1600, weights[1], paths[1])]
        found = count(parts, 3210)
        assert [one.samples for one in found.datasets] == naive
        assert found.unrecorded == 0
        wanted = [1600 * a + 1610 * b for a, b in zip(*weights, strict=True)]
        assert [one.expected for one in found.datasets] == pytest.approx(wanted)
        assert naive == pytest.approx(wanted, abs=2)


def test_exhaustive_blends_have_an_index_too():
    found = count([record(0, [300, 700], None, size=None)], 1000)
    assert [one.samples for one in found.datasets] == [300, 700]


def test_what_was_consumed_before_the_record_is_not_counted():
    found = count([record(160, [1.0], None)], 800)
    assert (found.unrecorded, found.datasets[0].samples) == (160, 640)


def test_roles_are_counted_where_the_composition_puts_them():
    """Of 5 samples 3 are forgotten; batches 2 to 5 are recorded."""
    blend = {"datasets": ["a", "b"], "weights": [0.5, 0.5], "size": 100}
    part = {"start": 10, "batch": 5, "forget": 3, "roles": {"forget": blend, "replay": blend}}
    index = consumed.dataset_index(blend, 100)
    sides = ([{"loss_mask": torch.ones(1), "of": (role, int(i))} for i in index] for role in "fr")
    run = ComposedDataset(*sides, forget_samples=3, global_batch_size=5, split="train")
    naive = Counter(run[place]["of"] for place in range(10, 30))
    found = count([part], 30)
    assert {(one.role[0], "ab".index(one.prefix)): one.samples for one in found.datasets} == naive


def test_a_start_that_reads_on_in_the_same_index_adds_nothing():
    first, same, other = record(0, [1.0], "a"), record(160, [1.0], "a"), record(320, [1.0], "b")
    assert consumed._append([first], same) == [first]
    assert consumed._append([first], other) == [first, other]
    # Back to an earlier checkpoint: what came after it never was.
    assert consumed._append([first, other], record(320, [1.0], "c"))[1:] == [
        record(320, [1.0], "c")
    ]
    assert consumed._append([first, other], same) == [first]


def test_a_checkpoint_without_a_record_and_an_index_of_something_else(tmp_path):
    with pytest.raises(DataError, match="expected a record of the data that were read"):
        count(None, 10)
    for name, array in (("short", np.zeros(5, np.int16)), ("floats", np.zeros(50))):
        np.save(tmp_path / f"{name}.npy", array)
        with pytest.raises(DataError, match="expected the data set of each of 10 samples"):
            count([record(0, [0.5, 0.5], str(tmp_path / f"{name}.npy"))], 10)
    (tmp_path / "cut.npy").write_bytes(b"\x93NUMPY")
    with pytest.raises(DataError, match=r"cut\.npy cannot be read"):
        count([record(0, [0.5, 0.5], str(tmp_path / "cut.npy"))], 10)
