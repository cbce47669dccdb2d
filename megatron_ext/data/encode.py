"""From a raw block to the bytes of a `.bin` file: what one worker does, and nothing else."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from megatron_ext.data.document_digests import document_digests
from megatron_ext.data.documents import Block, Record, parse_block
from megatron_ext.data.fast_tokenizer import FastTokenizer, first_difference
from megatron_ext.data.indexed import token_dtype
from megatron_ext.data.records import BadRecord
from megatron_ext.data.tokenizers import Encoded, Tokenizer, bounds_of
from megatron_ext.exceptions import DataError

if TYPE_CHECKING:
    from megatron_ext.data.conversations import ConversationFormat

# Share of the texts that are encoded a second time, by the exact tokenizer. It is some 8 times
# slower than gigatoken, so this costs 1.6%; a difference in one text of 1,000 in a corpus of a
# million texts stays unseen with a probability of exp(-2).
VERIFIED_SHARE = 1 / 500
# Of the input's start, what gigatoken has to prove itself on: about 0.3 s of the exact tokenizer.
_SAMPLE_TEXTS = 1000
_SAMPLE_CHARACTERS = 2_000_000


class BackendMismatchError(Exception):
    """gigatoken gave other ids than the exact tokenizer; the message says where."""


@dataclass
class EncodedKey:
    """The documents of a block for one key.

    Attributes:
        tokens: Ids in the type of the file.
        sequence_lengths: int32 `[sequences]`, in tokens.
        document_sequences: int32 `[documents]`.
        max_token: Largest id, 0 if there is none.
        digests: uint64, of the documents that have one, see `document_digests`.
    """

    tokens: bytes
    sequence_lengths: NDArray[np.int32]
    document_sequences: NDArray[np.int32]
    max_token: int
    digests: NDArray[np.uint64]


@dataclass
class EncodedBlock:
    """What became of a block; `keys` in the order of the encoder's keys."""

    path: str
    consumed: int
    text_bytes: int = 0
    keys: list[EncodedKey] = field(default_factory=list)
    bad: list[BadRecord] = field(default_factory=list)


class BlockEncoder:
    """Parses and encodes blocks.

    Args:
        tokenizer: Exact or fast; a fast one is verified on a random share of the texts.
        keys: Keys of a record; each makes a data set of its own.
        append_eod: Whether to end each non-empty document with the end-of-document id; a conversation that
            ends in it already is left as it is.
        conversations: How records are conversations, which have one key; None if they are text.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        keys: Sequence[str],
        append_eod: bool,
        conversations: ConversationFormat | None = None,
    ) -> None:
        assert not append_eod or tokenizer.eod_id is not None
        assert conversations is None or len(keys) == 1
        self._tokenizer = tokenizer
        self._keys = list(keys)
        self._parse, self._special = _parser(keys, conversations)
        self._joined = conversations is not None
        self._eod = tokenizer.eod_id if append_eod else None
        self._dtype = token_dtype(tokenizer.vocab_size)

    def __call__(self, block: Block) -> EncodedBlock:
        """Encodes a block.

        Raises:
            BackendMismatchError: The fast tokenizer is not exact on one of the verified texts.
            DataError: The tokenizer gives ids outside its vocabulary.
        """
        result = EncodedBlock(block.path, block.consumed)
        columns: list[list[str]] = [[] for _ in self._keys]
        counts: list[list[int]] = [[] for _ in self._keys]
        for record in self._parse(block):
            if isinstance(record, BadRecord):
                result.bad.append(record)
                continue
            for column, count, texts in zip(columns, counts, record, strict=True):
                column.extend(texts)
                count.append(len(texts))
        for column, count in zip(columns, counts, strict=True):
            texts = [text for text in column if text not in self._special]
            self._verify(texts, block)
            result.text_bytes += sum(
                len(text) if text.isascii() else len(text.encode()) for text in texts
            )
            result.keys.append(self._encode(column, count))
        return result

    def _encode(self, texts: Sequence[str], counts: Sequence[int]) -> EncodedKey:
        """Encodes the texts of documents that have `counts` texts each."""
        ids, bounds = self._encode_texts(texts)
        max_token = int(ids.max(initial=0))
        if self._eod is not None and len(ids):
            max_token = max(max_token, self._eod)
        # Also keeps ids from wrapping around: the type of the file is wide enough for the vocabulary.
        if max_token >= self._tokenizer.vocab_size or int(ids.min(initial=0)) < 0:
            raise DataError(
                f"the tokenizer gave ids from {int(ids.min())} to {max_token}, outside its own "
                f"vocabulary of {self._tokenizer.vocab_size} pieces"
            )
        lengths = np.diff(bounds)
        document = np.repeat(np.arange(len(counts)), counts)
        if self._joined:
            lengths = np.bincount(document, weights=lengths, minlength=len(counts)).astype(np.int64)
            document = np.arange(len(counts))
        document, lengths = document[lengths > 0], lengths[lengths > 0]
        if self._eod is not None:
            last = np.flatnonzero(np.diff(document, append=-1))
            ends = np.cumsum(lengths)[last]
            if self._joined:
                open_ended = ids[ends - 1] != self._eod
                last, ends = last[open_ended], ends[open_ended]
            ids = np.insert(ids, ends, self._eod)
            lengths[last] += 1
        tokens = ids.astype(self._dtype).tobytes()
        sizes = np.bincount(document, weights=lengths, minlength=len(counts)).astype(np.int64)
        bounds = np.concatenate(([0], np.cumsum(sizes))) * self._dtype.itemsize
        digests = document_digests(tokens, bounds, dtype=self._dtype, eod_id=self._tokenizer.eod_id)
        return EncodedKey(
            tokens=tokens,
            sequence_lengths=lengths.astype(np.int32),
            document_sequences=np.bincount(document, minlength=len(counts)).astype(np.int32),
            max_token=max_token,
            digests=digests[digests != 0],
        )

    def _encode_texts(self, texts: Sequence[str]) -> Encoded:
        """Encodes texts one by one, those that stand for a special token as that."""
        if not self._special:
            return self._tokenizer.encode_batch(texts)
        is_text = np.array([text not in self._special for text in texts], dtype=bool)
        ids, bounds = self._tokenizer.encode_batch(
            [text for text in texts if text not in self._special]
        )
        special = [self._special[text] for text in texts if text in self._special]
        # Each goes behind the texts before it.
        ids = np.insert(ids, bounds[np.cumsum(is_text)[~is_text]], special)
        lengths = np.ones(len(texts), dtype=np.int64)
        lengths[is_text] = np.diff(bounds)
        return ids, bounds_of(lengths)

    def _verify(self, texts: Sequence[str], block: Block) -> None:
        """Compares the two tokenizers on a share of the texts, the same ones in every run."""
        if not isinstance(self._tokenizer, FastTokenizer):
            return
        draw = random.Random(block.index).random
        chosen = [text for text in texts if draw() < VERIFIED_SHARE]
        different = first_difference(self._tokenizer, chosen) if chosen else None
        if different is not None:
            raise BackendMismatchError(
                f"gigatoken's ids differ from the reference tokenizer's on a text in "
                f"{block.file_of(chosen[different])}, "
                f"near record {block.first}: {chosen[different][:60]!r}"
            )


def sample_texts(
    blocks: Iterable[Block], keys: Sequence[str], conversations: ConversationFormat | None
) -> list[str]:
    """The first texts of the input, all keys: what gigatoken has to prove itself on."""
    parse, special = _parser(keys, conversations)
    texts: list[str] = []
    left = _SAMPLE_CHARACTERS
    for block in blocks:
        records = (record for record in parse(block) if not isinstance(record, BadRecord))
        for text in (text for record in records for found in record for text in found):
            if text in special:
                continue
            texts.append(text[:left])
            left -= len(texts[-1])
            if left <= 0 or len(texts) >= _SAMPLE_TEXTS:
                return texts
    return texts


def _parser(
    keys: Sequence[str], conversations: ConversationFormat | None
) -> tuple[Callable[[Block], Iterator[Record | BadRecord]], Mapping[str, int]]:
    """What makes records of a block, and the tokens of those of their texts that stand for one."""
    if conversations is None:
        return functools.partial(parse_block, keys=keys), {}
    # Its templates cost each start 25 ms.
    from megatron_ext.data.conversations import ConversationParser

    parser = ConversationParser(conversations)
    return parser, parser.special_ids
