"""Questions of benchmarks that stand in tokenised data, word for word.

A token of a question counts as seen if it lies in a run of `RUN` tokens that the data hold as well; a
question is known by the share of its tokens that are. That is the measure of arXiv 2307.09288, appendix A.6
(tokens in runs of more than 10, dirty from 80% on), without its gaps within a run. Another wording, another
case, a translation or an answer alone are not found, and texts of fewer than `RUN` tokens are not looked at.

Shapes: m tokens of a text, n of a block of the data.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_ext.data.documents import parse_block, read_blocks
from megatron_ext.data.indexed import bin_path, read_index_summary
from megatron_ext.data.inputs import format_of
from megatron_ext.data.records import BadRecord
from megatron_ext.data.tokenizers import Tokenizer
from megatron_ext.exceptions import ConfigError, DataError

# Tokens of a run, and the share of a question's tokens from which on it counts as known.
RUN, KNOWN = 11, 0.8
# Tokens at a time; bits of a hash that tell at once that most runs of the data are in no text.
_BLOCK, _BITS = 1 << 18, 24


def read_texts(path: Path, keys: Sequence[str]) -> list[str]:
    """Texts of a benchmark's file: JSON lines or Parquet, also compressed; a list is a text an entry.

    Args:
        path: the file.
        keys: fields that are looked for, each by itself.

    Raises:
        ConfigError: the file is missing, or of another format.
        DataError: a record is broken or lacks a field, which is named, or there are no texts.
    """
    if not path.is_file() or format_of(path) not in ("jsonl", "parquet"):
        what = "another format" if path.is_file() else "no file"
        raise ConfigError(f"--benchmark {path}: expected JSON lines or Parquet, found {what}")
    texts = []
    for block in read_blocks([path], keys=keys):
        for record in parse_block(block, keys):
            if isinstance(record, BadRecord):
                raise DataError(f"--benchmark {record}; --benchmark-keys names the fields")
            texts += [text for field in record for text in field]
    if not texts:
        raise DataError(f"--benchmark {path}: expected texts at {', '.join(keys)}, found none")
    return texts


def encode_texts(texts: Sequence[str], tokenizer: Tokenizer) -> list[NDArray[np.int64]]:
    """Ids `[m]` of each text, without those that end a document."""
    ids, bounds = tokenizer.encode_batch(texts)
    rows = [ids[start:end] for start, end in pairwise(bounds)]
    return [row[row != (-1 if tokenizer.eod_id is None else tokenizer.eod_id)] for row in rows]


def shares_in(
    prefix: str | Path,
    texts: Sequence[NDArray[np.int64]],
    *,
    vocab_size: int,
    advance: Callable[[int], Any] = lambda _: None,
) -> NDArray[np.float64]:
    """Which share of each text's tokens lies in runs that a data set holds.

    Runs are compared by a 64-bit hash, so that 10^12 tokens and 10^6 runs of texts give a false match with a
    probability of 5%. Runs across the end of a document count too; hardly any text has one.

    Args:
        prefix: Path without `.bin` and `.idx`.
        texts: Ids `[m]` of each.
        vocab_size: What all ids are less than, those of the data included.
        advance: Called with the bytes that were read since the last call.

    Returns:
        fp64 `[texts]`, NaN for texts of fewer than `RUN` tokens.
    """
    # A random number a token, and one a place in a run.
    generator = np.random.default_rng(0)
    of_token = generator.integers(2**64, size=vocab_size, dtype=np.uint64)
    of_place = generator.integers(2**64, size=RUN, dtype=np.uint64) | np.uint64(1)

    def hashes(ids: NDArray[Any]) -> NDArray[np.uint64]:
        """Of the runs that begin at each token, uint64 `[n - RUN + 1]`."""
        numbers, count = of_token[ids], max(0, len(ids) - RUN + 1)
        found = np.zeros(count, dtype=np.uint64)
        for place, factor in enumerate(of_place):
            found += numbers[place : place + count] * factor
        return found

    own = [hashes(text) for text in texts]
    wanted = np.unique(np.concatenate([np.empty(0, np.uint64), *own]))
    is_there = np.zeros(len(wanted), dtype=bool)
    may_be = np.zeros(1 << _BITS, dtype=bool)
    may_be[wanted >> np.uint64(64 - _BITS)] = True
    summary = read_index_summary(prefix)
    size = summary.dtype.itemsize
    for start in range(0, summary.tokens if len(wanted) else 0, _BLOCK):
        ids = np.fromfile(bin_path(prefix), summary.dtype, _BLOCK + RUN - 1, offset=start * size)
        found = hashes(ids)
        found = found[may_be[found >> np.uint64(64 - _BITS)]]
        places = np.minimum(np.searchsorted(wanted, found), len(wanted) - 1)
        is_there[places[wanted[places] == found]] = True
        advance(min(_BLOCK, summary.tokens - start) * size)
    shares = np.full(len(texts), np.nan)
    for number, runs in enumerate(own):
        if len(runs):
            seen = is_there[np.searchsorted(wanted, runs)]
            shares[number] = (np.convolve(seen, np.ones(RUN)) > 0.5).mean()
    return shares
