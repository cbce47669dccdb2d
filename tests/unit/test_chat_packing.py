"""Packed conversations: nothing is lost, nothing is twice, and an index has one content."""

import itertools
import re
from argparse import Namespace
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import pytest
import torch

from megatron_ext import chat
from megatron_ext.config import ChatConfig
from megatron_ext.data.chat_dataset import ChatDataset, Packing, pack
from megatron_ext.data.chat_tokens import ChatTokens, load_tokens
from megatron_ext.exceptions import DataError
from megatron_ext.model.documents import Documents
from tests.helpers.conversations import conversations, write_jsonl
from tests.helpers.entry import ROOT

LENGTH = 20
EOD = 9999


class Letters:
    """A template of one token a character, `EOD` at the end of a turn."""

    source = "letters"
    special_tokens: ClassVar = {"eos_token": "."}

    def encode(self, messages):
        ids, mask = [], []
        for message in messages:
            if "forbidden" in message["content"]:
                raise DataError("expected no forbidden text")
            new = [*message["content"].encode(), EOD]
            ids += new
            mask += [int(message["role"] == "assistant")] * len(new)
        return ids, mask


def tokens(lengths):
    """Conversations whose tokens are all different, the last half of each the assistant's."""
    bounds = np.concatenate(([0], np.cumsum(lengths)))
    ids = np.arange(bounds[-1], dtype=np.int32)
    mask = np.concatenate([[0] * (n // 2) + [1] * (n - n // 2) for n in lengths])
    return ChatTokens(ids, mask.astype(np.uint8), bounds, 0, 0, 0, "digest")


@pytest.fixture
def packing():
    lengths = np.random.RandomState(0).randint(2, LENGTH + 2, size=300)
    return Packing(tokens(lengths), seq_length=LENGTH, seed=5)


def test_every_epoch_has_every_token_once(packing):
    for epoch in range(3):
        span = range(packing.sequences(epoch), packing.sequences(epoch + 1))
        found = np.concatenate([packing.sequence(i)[0] for i in span])
        assert sorted(found.tolist()) == packing.tokens.ids.tolist()


def test_conversations_stay_whole_and_sequences_within_the_context(packing):
    lengths = packing.tokens.lengths
    for index in range(packing.sequences(1)):
        ids, mask = packing.sequence(index)
        assert len(ids) == sum(lengths[i] for i in packing.conversations(index)) <= LENGTH + 1
        breaks = np.flatnonzero(np.diff(ids) != 1) + 1
        assert {int(ids[b]) for b in [0, *breaks]} <= set(packing.tokens.bounds.tolist())
        assert mask.any()
    assert packing.fill > 0.9


def test_epochs_differ_and_are_the_same_for_the_same_seed(packing):
    def order(packing, epoch):
        span = range(packing.sequences(epoch), packing.sequences(epoch + 1))
        return [packing.conversations(i) for i in span]

    again = Packing(packing.tokens, seq_length=LENGTH, seed=5)
    other = Packing(packing.tokens, seq_length=LENGTH, seed=6)
    assert order(packing, 0) != order(packing, 1)
    # Another process may ask for the second epoch first.
    assert order(again, 1) == order(packing, 1)
    assert order(again, 0) == order(packing, 0)
    assert order(other, 0) != order(packing, 0)


@pytest.mark.parametrize(
    ("seed", "order"), [(1234, [[4, 3], [5], [1, 2, 0, 6]]), (2, [[1, 4, 0], [2, 6, 3], [5]])]
)
def test_the_order_of_a_seed_is_written_down(seed, order):
    """A resumed run must see the samples that were left, also after an upgrade."""
    packing = Packing(tokens([5, 9, 3, 12, 7, 20, 4]), seq_length=LENGTH, seed=seed)
    assert [packing.conversations(i) for i in range(packing.sequences(1))] == order


def test_a_sample_says_where_its_conversations_lie(packing):
    together = ChatDataset(packing, samples=1000, eod=EOD, split="train")
    apart = ChatDataset(packing, samples=1000, eod=EOD, split="train", apart=True)
    counts, whole = set(), 0
    for index in range(packing.sequences(1)):
        sample = apart[index]
        lengths, positions = sample.pop("cu_seqlens"), sample.pop("position_ids")
        assert lengths.dtype == torch.int32
        (bounds,) = Documents.from_lengths(lengths[None]).bounds
        assert len(lengths) == LENGTH + 1
        own = packing.tokens.lengths[packing.conversations(index)]
        # The last label is no token; what fills the sequence up belongs to no conversation.
        ends = [0, *own.cumsum().clip(max=LENGTH).tolist()]
        assert bounds == tuple(sorted({*ends, LENGTH}))
        expected = [place for a, b in itertools.pairwise(bounds) for place in range(b - a)]
        assert positions.tolist() == expected
        rest = together[index]
        del rest["position_ids"]
        assert sample["source"] == rest.pop("source")
        assert all(torch.equal(sample[key], value) for key, value in rest.items())
        counts.add(len(own))
        whole += ends[-1] == LENGTH
    assert max(counts) > 1
    assert 0 < whole < packing.sequences(1), "some of the sequences are full, others not"


def test_first_fit_takes_the_first_sequence_with_room():
    order = np.arange(6)
    assert pack(np.array([6, 7, 3, 4, 3, 1]), order, capacity=10) == [[0, 2, 5], [1, 4], [3]]
    # With one sequence open at a time none is gone back to.
    found = pack(np.array([6, 7, 3, 4, 3, 1]), order, capacity=10, window=1)
    assert found == [[0], [1, 2], [3, 4, 5]]


def test_a_sample_is_that_of_megatrons_gpt_dataset(packing):
    dataset = ChatDataset(packing, samples=1000, eod=EOD, split="train")
    assert len(dataset) == 1000 > packing.sequences(1)
    for index in (0, packing.sequences(1) + 3, 999):
        ids, mask = packing.sequence(index)
        sample = dataset[index]
        source = sample.pop("source")
        assert source == f"sequence {index} (conversations {packing.conversations(index)})"
        assert {key: str(value.dtype) for key, value in sample.items()} == {
            "tokens": "torch.int64",
            "labels": "torch.int64",
            "loss_mask": "torch.float32",
            "position_ids": "torch.int64",
        }
        count = len(ids)
        filled = [*ids.tolist(), *[EOD] * (LENGTH + 1 - count)]
        assert sample["tokens"].tolist() == filled[:-1]
        assert sample["labels"].tolist() == filled[1:]
        assert sample["loss_mask"].tolist() == [*mask[1:].tolist(), *[0] * (LENGTH + 1 - count)]
        assert sample["position_ids"].tolist() == list(range(LENGTH))
        # Every token that the assistant writes is a label: none is first in its sequence.
        assert sample["labels"][sample["loss_mask"] > 0].tolist() == ids[mask > 0].tolist()


def test_long_conversations_are_cut_at_the_end_or_dropped(tmp_path):
    def turns(question, answer):
        return [
            {"role": "user", "content": "q" * question},
            {"role": "assistant", "content": "a" * answer},
        ]

    exact = turns(9, LENGTH - 10)
    path = write_jsonl(tmp_path / "a.jsonl", [turns(3, 4), turns(5, 30), turns(40, 2), exact])
    found = load_tokens([path], Letters(), limit=LENGTH + 1, tokenizer_digest="")
    assert found.lengths.tolist() == [9, LENGTH + 1, LENGTH + 1]
    assert (found.truncated, found.lost, found.dropped) == (1, 37 - LENGTH - 1, 1)
    assert found.mask.tolist() == [0] * 4 + [1] * 5 + [0] * 6 + [1] * 15 + [0] * 10 + [1] * 11
    with pytest.raises(DataError, match="found 4 conversations, 4 of them without"):
        load_tokens([path], Letters(), limit=3, tokenizer_digest="")


def test_tokens_are_kept_and_found_again(tmp_path, monkeypatch):
    path = write_jsonl(tmp_path / "a.jsonl", conversations(20, seed=1))
    options = {"limit": 100, "tokenizer_digest": "x", "cache": tmp_path / "cache"}
    first = load_tokens([path], Letters(), **options)
    monkeypatch.setattr(Letters, "encode", lambda *_: pytest.fail("tokenised a second time"))
    second = load_tokens([path], Letters(), **options)
    assert second.ids.tolist() == first.ids.tolist()
    assert second.mask.tolist() == first.mask.tolist()
    assert second.describe() == first.describe()
    monkeypatch.undo()
    write_jsonl(path, conversations(20, seed=2))
    changed = load_tokens([path], Letters(), **options)
    assert changed.digest != first.digest
    assert load_tokens([path], Letters(), **{**options, "limit": 50}).digest != changed.digest
    other = {**options, "tokenizer_digest": "y"}
    assert load_tokens([path], Letters(), **other).digest != changed.digest
    monkeypatch.setattr(Letters, "source", "other letters")
    assert load_tokens([path], Letters(), **options).digest != changed.digest
    monkeypatch.undo()
    # The names of the special tokens may change while the vocabulary, and with it its digest, does not.
    monkeypatch.setattr(Letters, "special_tokens", {"eos_token": "!"})
    assert load_tokens([path], Letters(), **options).digest != changed.digest


def test_kept_tokens_are_read_where_nothing_can_be_written(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", conversations(20, seed=1))
    options = {"limit": 100, "tokenizer_digest": "x", "cache": tmp_path / "cache"}
    first = load_tokens([path], Letters(), **options)
    [lock] = (tmp_path / "cache").glob("*.lock")
    lock.unlink()
    lock.mkdir()  # which cannot be opened
    assert load_tokens([path], Letters(), **options).digest == first.digest
    next((tmp_path / "cache").glob("*.json")).unlink()
    with pytest.raises(
        DataError, match=r"--data-cache-path .*cache: expected a directory to write"
    ):
        load_tokens([path], Letters(), **options)


@pytest.mark.parametrize(("part", "share"), [("ids", 0.5), ("mask", 0.0), ("json", 0.5)])
def test_kept_tokens_that_were_cut_are_named(tmp_path, part, share):
    path = write_jsonl(tmp_path / "a.jsonl", conversations(20, seed=1))
    options = {"limit": 100, "tokenizer_digest": "x", "cache": tmp_path / "cache"}
    first = load_tokens([path], Letters(), **options).ids.tolist()
    [file] = (tmp_path / "cache").glob(f"*.{part}")
    file.write_bytes(file.read_bytes()[: int(share * file.stat().st_size)])
    with pytest.raises(DataError, match=r"chat_\w+\.\*: expected the tokens .* cannot be read"):
        load_tokens([path], Letters(), **options)
    for kept in (tmp_path / "cache").iterdir():
        kept.unlink()
    assert load_tokens([path], Letters(), **options).ids.tolist() == first


def test_all_bad_records_are_counted_and_the_first_are_named(tmp_path):
    bad = [{"role": "user", "content": "forbidden"}, {"role": "assistant", "content": "a"}]
    good = conversations(3, seed=1)
    path = write_jsonl(tmp_path / "a.jsonl", [*good, bad, 5, *[bad] * 6])
    with pytest.raises(DataError) as error:
        load_tokens([path], Letters(), limit=100, tokenizer_digest="")
    assert str(error.value).startswith(
        f"8 of 11 conversations are bad: {path}:4: expected no forbidden text; {path}:5: expected a JSON"
    )
    assert str(error.value).endswith("; and 3 more")


def test_the_recipes_readme_counts_the_steps_of_packed_conversations():
    """It says how many conversations a step has, and how many steps that makes."""
    text = (ROOT / "examples/paper/README.md").read_text()
    lengths = np.random.default_rng(1).lognormal(np.log(556) - 0.8**2 / 2, 0.8, 30_000)
    lengths = np.clip(lengths.astype(np.int64), 8, 4097)
    each = len(lengths) / len(pack(lengths, np.arange(len(lengths)), capacity=4097))
    rows = re.findall(r"^\|.*\| (\d+) \| about (\d+) \| about ([\d,]+) \|$", text, re.MULTILINE)
    assert [int(batch) for batch, _, _ in rows] == [64, 9, 8]
    for batch, held, steps in rows:
        assert int(held) == pytest.approx(int(batch) * each, rel=0.02)
        assert int(steps.replace(",", "")) == pytest.approx(2e6 / int(batch) / each, rel=0.02)


def test_a_run_packs_to_the_context_and_one_more_for_the_last_label(tmp_path, monkeypatch):
    (tmp_path / "a.jsonl").touch()
    limits = []

    def load(paths, template, *, limit, **_):
        limits.append(limit)
        return tokens([5, 9, 3, 12, 7, 20, 4])

    template = SimpleNamespace(check_tuning=lambda: None)
    given = {"_check": None, "load_template": template, "tokenizer_digest": "x"}
    for name, value in (given | {"TokenizerSpec": None}).items():
        monkeypatch.setattr(chat, name, lambda *_, value=value, **__: value)
    monkeypatch.setattr(chat, "load_tokens", load)
    names = ("tokenizer_type", "tokenizer_model", "tokenizer_hf_no_use_fast", "trust_remote_code")
    names += ("chat_template", "data_cache_path", "train_iters", "train_samples")
    config = ChatConfig(chat_data_path=[str(tmp_path / "a.jsonl")], chat_epochs=3)
    runs = []
    for seed in (2, 3):
        args = Namespace(**dict.fromkeys(names), seq_length=LENGTH, seed=seed, global_batch_size=2)
        runs.append(chat.chat_run(args, config))
    assert limits == [LENGTH + 1] * 2
    assert runs[0].train.sequences(3) == 9
    assert runs[0].iterations == 5  # the last batch goes on into the fourth epoch
    assert runs[0].digest != runs[1].digest


def test_each_split_has_its_own_conversations(packing, monkeypatch):
    monkeypatch.setattr(chat, "reads_data", lambda args, stage: stage != 1)
    valid = Packing(tokens([3, 4]), seq_length=LENGTH, seed=5)
    config, template = ChatConfig(chat_data_path=["a"]), SimpleNamespace(eod_id=EOD)
    args = Namespace(dataloader_inter_document_masking=False)
    provide = chat.ChatRun(config, template, packing, valid, None).provider(args)
    assert not provide((10, 4, 0))[0].apart
    args.dataloader_inter_document_masking = True
    assert all(dataset.apart for dataset in provide((10, 4, 0))[:2])
    found, nothing = provide((10, 4, 0)), provide((10, 0, 0))[1:]
    assert [(d.packing, len(d), d.eod, d.split.name) for d in found[:2]] == [
        *((packing, 10, EOD, "train"), (valid, 4, EOD, "valid"))
    ]
    assert (found[2], *nothing) == (None, None, None)
    assert provide((10, 4, 0), vp_stage=1) == (None, None, None)
