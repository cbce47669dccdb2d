"""Byte-level tokenizers that gigatoken does not take as they are: the same ids as tokenizers'."""

import json
import sys
from itertools import pairwise

import numpy as np
import pytest
from tokenizers import normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from megatron_ext.data.byte_level import _numbers, _splitter, adapt
from megatron_ext.data.fast_tokenizer import FastTokenizer, choose_tokenizer
from megatron_ext.data.tokenizers import TokenizerSpec
from tests.helpers.text import make_texts, train_byte_level

KINDS = {
    "without some bytes": {"every_byte": False},
    "each digit": {"digits": "each"},
    "digits together": {"digits": "together"},
    "each digit, without some bytes": {"digits": "each", "every_byte": False},
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return {name: train_byte_level(folder / name, **options) for name, options in KINDS.items()}


def choose(folder):
    spec = TokenizerSpec(tokenizer_type="HuggingFaceTokenizer", tokenizer_model=folder)
    tokenizer, message = choose_tokenizer(spec, "auto", make_texts(20))
    assert isinstance(tokenizer, FastTokenizer), message
    return tokenizer


def rows(tokenizer, texts):
    ids, bounds = tokenizer.encode_batch(texts)
    assert len(bounds) == len(texts) + 1
    return [ids[start:end].tolist() for start, end in pairwise(bounds)]


@pytest.mark.parametrize("name", KINDS)
def test_the_ids_are_those_of_tokenizers(folders, name):
    rng = np.random.default_rng(0)
    pieces = [
        *map(chr, range(0x250)),
        *"\u3000東ﬁ🙂\u0301\U00050000\U0001d7d8",
        *["0", "1", "9", "²", "Ⅷ", "٣", "四", " ", "  ", "\n", "'s", "</s>", "the"] * 12,
    ]
    texts = ["".join(rng.choice(pieces, size=n)) for n in rng.integers(0, 40, size=3000)]
    tokenizer = choose(folders[name])
    assert rows(tokenizer, texts) == rows(tokenizer.reference, texts)
    assert rows(tokenizer, []) == []


def test_a_byte_that_the_tokenizer_lacks_sends_its_text_alone_to_the_exact_one(
    folders, monkeypatch
):
    tokenizer = choose(folders["without some bytes"])
    exact, asked = tokenizer.reference.encode_batch, []
    texts = ["the cat", "the</s>", "th\x04e", "", "e\U00050000e", "of"]
    expected = rows(tokenizer.reference, texts)

    def encode(texts):
        asked.extend(texts)
        return exact(texts)

    monkeypatch.setattr(tokenizer.reference, "encode_batch", encode)
    assert rows(tokenizer, texts) == expected
    assert asked == [texts[1], texts[2], texts[4]]


def test_bytes_are_added_behind_all_tokens(folders):
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folders["without some bytes"])
    tokenizer.add_tokens(["<late>"])
    adapted = adapt(tokenizer)
    assert adapted.missing == len(tokenizer) == max(tokenizer.get_vocab().values()) + 1
    vocabulary = adapted.tokenizer.get_vocab()
    assert tokenizer.get_vocab().items() <= vocabulary.items()
    assert {*pre_tokenizers.ByteLevel.alphabet()} <= {*vocabulary}
    assert len({*vocabulary.values()}) == len(vocabulary)


def test_other_tokenizers_are_left_as_they_are(folders, tmp_path):
    whole = train_byte_level(tmp_path / "whole")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(whole)
    assert adapt(tokenizer).tokenizer is tokenizer
    # What is normalised first may have other digits, and a blank before each piece gigatoken would not put.
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folders["each digit"])
    tokenizer.backend_tokenizer.normalizer = normalizers.NFKC()
    assert adapt(tokenizer).split is None
    tokenizer.backend_tokenizer.normalizer = None
    assert adapt(tokenizer).split is not None
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(), pre_tokenizers.ByteLevel(add_prefix_space=True)]
    )
    assert adapt(tokenizer).split is None


def test_digits_are_those_of_tokenizers():
    """Whatever Unicode it knows; Python may know another."""
    characters = [chr(code) for code in range(sys.maxunicode + 1) if not 0xD800 <= code < 0xE000]
    numbers = {c for run in _numbers() for c in map(chr, range(ord(run[0]), ord(run[-1]) + 1))}
    assert {"0", "9", "²", "Ⅷ", "٣", "\U0001d7d8"} <= numbers
    assert not numbers & {*"a四 -.\n"}
    step = pre_tokenizers.Digits(individual_digits=True)
    for text in ("12a3", "a² b", "x\U0001d7d80", "🙂5", "12", "ab", "\n0\n", "".join(characters)):
        pieces = [piece for piece, _ in step.pre_tokenize_str(text)]
        assert _splitter(_numbers(), individual=True)(text) == pieces
    assert _splitter(_numbers(), individual=False)("12a3") == ["12", "a", "3"]
    assert json.dumps(_splitter(_numbers(), individual=True)("")) == "[]"
