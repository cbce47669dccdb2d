"""Documents that are exact copies of earlier ones, within a data set and across several.

The digest and the number of the first document of every text are held in memory; what does not fit is held in
parts, by the digests' values, and everything is read once for each. Among 10^9 documents two different ones
have the same digest with a probability of 3%.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from megatron_ext.data.indexed import IndexSummary
from megatron_ext.data.read_digests import (
    Comparable,
    Digests,
    ShowProgress,
    comparable,
    count_tokens,
    read_digests,
)

# Bytes of memory for a document while the first ones are sorted, measured: see the tests.
_PER_DOCUMENT = 48
_BATCH = 1 << 16  # documents at least that are looked up at a time
_EXAMPLES = 5


@dataclass
class Duplicates:
    """Documents of a data set that are copies of earlier ones.

    Attributes:
        summary: size of the data set.
        documents: copies.
        tokens: of them.
        elsewhere: copies of documents of the data sets before this one.
        examples: the first few of them: number, data set of the first document of this text, its number.
    """

    summary: IndexSummary
    documents: int = 0
    tokens: int = 0
    elsewhere: int = 0
    examples: list[tuple[int, str, int]] = field(default_factory=list)


def find_duplicates(
    prefixes: Sequence[str | Path],
    *,
    max_bytes: int = 1 << 30,
    eod_id: int | None = None,
    workers: int = 1,
    progress: ShowProgress = lambda *_: None,
) -> list[Duplicates]:
    """Find documents that are copies of earlier ones, in the order of the data sets.

    Args:
        prefixes: Distinct data sets, paths without `.bin` and `.idx`.
        max_bytes: Of memory for digests and numbers of documents.
        eod_id: Id that ends documents where a data set has no manifest; None: the others', if one has one.
        workers: Processes that read; the result does not depend on it.
        progress: See `ShowProgress`.

    Returns:
        For each data set the copies in it.

    Raises:
        DataError: a file is missing or broken, or two data sets were made with different tokenizers.
    """
    sets = comparable(prefixes, eod_id=eod_id)
    found = [Duplicates(each.summary) for each in sets]
    starts = np.cumsum([0, *(each.summary.documents for each in sets)])
    parts = -(-int(starts[-1]) * _PER_DOCUMENT // max_bytes)
    with closing(read_digests(sets * parts, workers=workers, progress=progress)) as stream:
        for remainder, blocks in groupby(stream, key=lambda block: block.place // len(sets)):
            seen = _Seen()
            for values, numbers in _batches(blocks, starts, remainder, parts, seen):
                firsts = seen.first(values, numbers)
                copies = firsts != numbers
                _add(found, sets, starts, numbers[copies], firsts[copies])
    return found


class _Seen:
    """The digest of every text, ascending, and the number of the first document that has it."""

    def __init__(self) -> None:
        self._digests = np.empty(0, dtype=np.uint64)
        self._numbers = np.empty(0, dtype=np.int64)

    def __len__(self) -> int:
        """Texts."""
        return len(self._digests)

    def first(self, values: NDArray[np.uint64], numbers: NDArray[np.int64]) -> NDArray[np.int64]:
        """Takes in documents behind those that were seen: for each, the number of the first with its text.

        Args:
            values: `[documents]`, digests.
            numbers: `[documents]`, ascending.
        """
        order = np.argsort(values, kind="stable")
        values = values[order]
        begin = np.flatnonzero(np.concatenate(([True], values[1:] != values[:-1])))
        times = np.diff(begin, append=len(values))
        values, firsts = values[begin], numbers[order[begin]]
        places = np.searchsorted(self._digests, values)
        known = np.zeros(len(values), dtype=bool)
        inside = places < len(self)
        known[inside] = self._digests[places[inside]] == values[inside]
        firsts[known] = self._numbers[places[known]]
        result = np.empty_like(numbers)
        result[order] = np.repeat(firsts, times)
        self._digests = np.insert(self._digests, places[~known], values[~known])
        self._numbers = np.insert(self._numbers, places[~known], firsts[~known])
        return result


def _batches(
    blocks: Iterable[Digests], starts: NDArray[np.int64], remainder: int, parts: int, seen: _Seen
) -> Iterator[tuple[NDArray[np.uint64], NDArray[np.int64]]]:
    """Digests of one part and the numbers of their documents over all data sets.

    A batch grows with what was seen, which is copied once for each.
    """
    values, numbers, count = list[NDArray[np.uint64]](), list[NDArray[np.int64]](), 0
    for block in blocks:
        chosen = np.flatnonzero((block.values % parts == remainder) & (block.values != 0))
        values.append(block.values[chosen])
        numbers.append(starts[block.place % (len(starts) - 1)] + block.first + chosen)
        count += len(chosen)
        if count > max(_BATCH, len(seen) // 4):
            yield _joined(values), _joined(numbers)
            count = 0
    if count:
        yield _joined(values), _joined(numbers)


def _joined(arrays: list[NDArray]) -> NDArray:
    """One array; the list is emptied, for its memory."""
    array = np.concatenate(arrays)
    arrays.clear()
    return array


def _add(
    found: Sequence[Duplicates],
    sets: Sequence[Comparable],
    starts: NDArray[np.int64],
    copies: NDArray[np.int64],
    firsts: NDArray[np.int64],
) -> None:
    """Adds copies, which are ascending, and the first documents of their texts, to what was found."""
    owners, origins = (
        np.searchsorted(starts, numbers, "right") - 1 for numbers in (copies, firsts)
    )
    for owner in np.unique(owners):
        result, mine = found[owner], owners == owner
        numbers, origin = copies[mine] - starts[owner], origins[mine]
        result.documents += len(numbers)
        result.tokens += int(count_tokens(sets[owner], numbers).sum())
        result.elsewhere += int((origin != owner).sum())
        shown = zip(numbers[:_EXAMPLES], origin, firsts[mine], strict=False)
        result.examples += [
            (int(n), sets[o].prefix, int(first - starts[o])) for n, o, first in shown
        ]
        result.examples = sorted(result.examples)[:_EXAMPLES]
