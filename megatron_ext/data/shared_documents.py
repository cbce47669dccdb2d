"""Documents that data sets share with others: all are compared, by their digests.

The digests of one side are held in memory, those of the other side looked up. What does not fit the memory is
held in parts, by the digests' values, so that no digest is in two parts; everything is read once for each.
"""

from collections.abc import Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from itertools import groupby, islice
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from megatron_ext.data.read_digests import Digests, ShowProgress, comparable, read_digests

# Bytes of memory for a document's digest while they are sorted, measured: see the tests.
_PER_DOCUMENT = 36
_BATCH = 1 << 16  # digests at least that are sorted at a time
_EXAMPLES = 5


@dataclass
class Overlap:
    """Documents that two data sets share.

    Attributes:
        documents: documents of the second that the first has as well.
        distinct: different documents among them.
        examples: numbers of the first few of them in the second.
    """

    documents: int = 0
    distinct: int = 0
    examples: list[int] = field(default_factory=list)


def find_overlaps(
    firsts: Sequence[str | Path],
    seconds: Sequence[str | Path],
    *,
    max_bytes: int = 1 << 30,
    eod_id: int | None = None,
    workers: int = 1,
    progress: ShowProgress = lambda *_: None,
) -> list[list[Overlap]]:
    """Find the documents that each data set of one side shares with each of the other.

    The digests of all firsts are held together, in as many parts as the memory asks for; all data sets are
    read once for each part.

    Args:
        firsts: Prefixes; better the side with fewer documents.
        seconds: Prefixes.
        max_bytes: Of memory for digests.
        eod_id: Id that ends documents where a data set has no manifest; None: the others', if one has one.
        workers: Processes that read; the result does not depend on it.
        progress: See `ShowProgress`.

    Returns:
        For each of the firsts, what it shares with each of the seconds.

    Raises:
        DataError: a file is missing or broken, or two data sets were made with different tokenizers.
    """
    sets = comparable([*firsts, *seconds], eod_id=eod_id)
    documents = sum(each.summary.documents for each in sets[: len(firsts)])
    parts = -(-documents * _PER_DOCUMENT // max_bytes)
    found = [[Overlap() for _ in firsts] for _ in seconds]
    with closing(read_digests(sets * parts, workers=workers, progress=progress)) as stream:
        groups = (blocks for _, blocks in groupby(stream, key=lambda each: each.place))
        for remainder in range(parts):
            known = _Known(
                [_distinct(blocks, remainder, parts) for blocks in islice(groups, len(firsts))]
            )
            for overlaps, blocks in zip(found, islice(groups, len(seconds)), strict=True):
                known.count(blocks, overlaps)
    return [list(of_first) for of_first in zip(*found, strict=True)]


class _Known:
    """The digests of several data sets, with their owners.

    Args:
        owned: For each owner its digests, ascending and distinct. The list is emptied, for its memory.
    """

    def __init__(self, owned: list[NDArray[np.uint64]]) -> None:
        self._owners = np.repeat(
            np.arange(len(owned), dtype=np.min_scalar_type(len(owned))), list(map(len, owned))
        )
        self._digests = np.concatenate(owned)
        several = len(owned) > 1
        owned.clear()
        if several:
            order = np.argsort(self._digests, kind="stable")
            self._digests, self._owners = self._digests[order], self._owners[order]

    def count(self, blocks: Iterable[Digests], overlaps: Sequence[Overlap]) -> None:
        """Add what the blocks of a data set share with each owner to `overlaps`."""
        if not len(self._digests):
            return
        shared = np.zeros(len(self._digests), dtype=bool)
        for block in blocks:
            order = np.argsort(block.values)  # neighbours are looked up faster
            values = block.values[order]
            begin = np.searchsorted(self._digests, values)
            hits = self._digests[np.minimum(begin, len(self._digests) - 1)] == values
            if not hits.any():
                continue
            order, begin = order[hits], begin[hits]
            times = np.searchsorted(self._digests, values[hits], side="right") - begin
            # One entry for each owner of each document: `begin`, `begin` + 1, ...
            entries = np.repeat(begin - (np.cumsum(times) - times), times) + np.arange(times.sum())
            shared[entries] = True
            owners, numbers = self._owners[entries], block.first + np.repeat(order, times)
            for owner, count in enumerate(np.bincount(owners)):
                if count:
                    overlap = overlaps[owner]
                    overlap.documents += int(count)
                    mine = [*overlap.examples, *numbers[owners == owner].tolist()]
                    overlap.examples = sorted(mine)[:_EXAMPLES]
        for owner, count in enumerate(np.bincount(self._owners[shared])):
            overlaps[owner].distinct += int(count)


def _distinct(blocks: Iterable[Digests], remainder: int, parts: int) -> NDArray[np.uint64]:
    """Ascending and distinct digests, one in `parts`."""
    kept, waiting, count = np.empty(0, dtype=np.uint64), list[NDArray[np.uint64]](), 0
    for block in blocks:
        values = block.values
        waiting.append(values[(values % parts == remainder) & (values != 0)])
        count += len(waiting[-1])
        # Else a text that is there a million times would fill the memory.
        if count > max(_BATCH, len(kept) // 2):
            kept, count = _merged([kept, *waiting]), 0
            waiting.clear()
    return _merged([kept, *waiting])


def _merged(arrays: list[NDArray[np.uint64]]) -> NDArray[np.uint64]:
    together = np.concatenate(arrays)
    arrays.clear()
    together.sort()
    differs = np.ones(len(together), dtype=bool)
    np.not_equal(together[1:], together[:-1], out=differs[1:])
    return together[differs]
