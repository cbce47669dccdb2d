"""Whether a text holds any of some strings, fast enough to be asked of every document."""

import re
from collections.abc import Callable, Sequence
from itertools import groupby


def contains_any(needles: Sequence[str]) -> Callable[[str], bool]:
    """Makes a function that tells whether a text holds any of the strings.

    `in` scans 1.4 GB/s divided by the strings, a pattern at least 0.1 GB/s with any number of them, and 3
    GB/s between places that may begin one, where all begin with the same character, such as "<".

    Args:
        needles: The strings; none of them is in no text.
    """
    if len(needles) <= 6 and len({needle[:1] for needle in needles}) != 1:
        return lambda text: any(needle in text for needle in needles)
    search = re.compile(_pattern(sorted(needles))).search
    return lambda text: search(text) is not None


def _pattern(words: Sequence[str]) -> str:
    """Finds any of some sorted words by what they begin with in common.

    One after the other, 790 pieces like those of Mistral's tokenizer were looked for in HTML at 3 MB/s.
    """
    if "" in words:
        return ""  # what is longer is found as well
    parts = []
    for _, group in groupby(words, key=lambda word: word[0]):
        alike = [*group]
        shared = _shared(alike[0], alike[-1])
        parts.append(re.escape(shared) + _pattern([word[len(shared) :] for word in alike]))
    return parts[0] if len(parts) == 1 else f"(?:{'|'.join(parts)})"


def _shared(first: str, last: str) -> str:
    """What the first and the last of sorted words begin with, and so all between them."""
    for i, (one, other) in enumerate(zip(first, last, strict=False)):
        if one != other:
            return first[:i]
    return first  # it is sorted before what goes on from it
