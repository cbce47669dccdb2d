"""Weights of a blend from shares of its tokens, and how often each data set is read then.

Every training sample has the same number of tokens, so a share of tokens is a share of samples. The
weights are whole numbers of samples that add up to those of the run: Megatron's blend, which takes the
data set that is furthest behind at each sample, is then off by a sample or two at its end.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_ext.data.indexed import idx_path, map_index, read_index_summary
from megatron_ext.exceptions import ConfigError, DataError

REST = "rest"
# Up to 4 epochs repeated data is nearly as good as new data (arXiv 2305.16264, section 6).
MOST_EPOCHS = 4


@dataclass(frozen=True)
class Source:
    """One source of text, in any number of data sets, which are read equally often.

    Attributes:
        share: ``2%``, a number of tokens, or ``rest``.
        prefixes: its data sets.
    """

    share: str
    prefixes: list[str]


@dataclass(frozen=True)
class Part:
    """What a run will read of a data set.

    Attributes:
        prefix: the data set.
        source: number of its source.
        samples: that the run reads; its weight.
        tokens: of those samples.
        available: tokens of its training split.
    """

    prefix: str
    source: int
    samples: int
    tokens: int
    available: int

    @property
    def epochs(self) -> float:
        """Times that the training split is read."""
        return self.tokens / self.available


def plan_blend(
    sources: Sequence[Source],
    *,
    samples: int,
    seq_length: int,
    split: str,
    flag: str,
    tokens: float | None = None,
) -> list[Part]:
    """Spread the samples of a run over its sources and their data sets.

    Args:
        sources: with their shares.
        samples: of the whole blend.
        seq_length: tokens of a sample.
        split: Megatron's ``--split``.
        flag: that named the sources, for messages.
        tokens: of which numbers of tokens are shares: what was asked for, before it was rounded up to whole
            batches; None: those of the samples.

    Raises:
        ConfigError: the shares do not make a whole, or are less than a sample, or a data set is named twice.
        DataError: a data set is missing, broken, or has nothing to train on.
    """
    whole = samples * seq_length if tokens is None else tokens
    shares = parse_shares([source.share for source in sources], whole, flag)
    prefixes = [prefix for source in sources for prefix in source.prefixes]
    # Both would be read from the same beginning, and neither as often as is asked for.
    seen: set[Path] = set()
    for prefix in prefixes:
        if (place := idx_path(prefix).resolve()) in seen:
            raise ConfigError(f"{flag}: expected each data set once, found {prefix} twice")
        seen.add(place)
    owner = [i for i, source in enumerate(sources) for _ in source.prefixes]
    available = [training_tokens(prefix, split) for prefix in prefixes]
    totals = np.bincount(owner, weights=available)
    exact = [samples * shares[i] * n / totals[i] for i, n in zip(owner, available, strict=True)]
    parts = [
        Part(prefix, i, number, number * seq_length, tokens)
        for prefix, i, number, tokens in zip(
            prefixes, owner, _whole(exact, samples), available, strict=True
        )
    ]
    for part in parts:
        if part.samples == 0:
            raise ConfigError(
                f"{flag}: expected a share of at least one sample of {seq_length} tokens for "
                f"{part.prefix}, found {exact[parts.index(part)]:.3g} samples"
            )
    return parts


def parse_shares(texts: Sequence[str], tokens: float, flag: str) -> list[float]:
    """Shares of 1 from percentages, numbers of tokens, and at most one rest.

    Args:
        texts: as they were typed.
        tokens: of the whole.
        flag: for messages.

    Raises:
        ConfigError: they are no shares, or do not add up to the whole.
    """
    shares: list[float | None] = []
    for text in texts:
        try:
            part = (
                float(text[:-1]) / 100
                if text.endswith("%")
                else float(text) / tokens
                if text != REST
                else None
            )
        except ValueError:
            part = math.nan
        if part is not None and not 0 < part <= 1:
            raise ConfigError(
                f"{flag}: expected a share like 2%, a number of tokens up to {tokens:,.0f} or {REST}, found "
                f"{text}"
            )
        shares.append(part)
    known = sum(part for part in shares if part is not None)
    missing = shares.count(None)
    if missing > 1 or (missing and known >= 1) or (not missing and abs(known - 1) > 1e-6):
        raise ConfigError(
            f"{flag}: expected shares of 100% together, or less and one {REST}, found {' '.join(texts)}"
        )
    # What rounded percentages lack would be samples that no data set is asked for.
    whole = 1.0 if missing else known
    return [1 - known if part is None else part / whole for part in shares]


def training_tokens(prefix: str, split: str) -> int:
    """Tokens of a data set's training split, exactly, from two places of its index.

    Args:
        prefix: path without ``.bin`` and ``.idx``.
        split: Megatron's ``--split``, which divides sequences.

    Raises:
        ConfigError: the split leaves nothing to train on.
        DataError: the data set is missing or broken, or no sequence falls into the split.
    """
    try:
        parts = [float(part) for part in split.split(",")]
        share = parts[0] / sum(parts)
    except (ValueError, ZeroDivisionError):
        share = 0.0
    if not 0 < share <= 1:
        raise ConfigError(f"--split: expected a share for training, found {split}")
    summary = read_index_summary(prefix)
    end = round(share * float(summary.sequences))  # as Megatron
    if end == 0:
        raise DataError(
            f"--split: expected sequences of {prefix} to train on, found none of its "
            f"{summary.sequences} with shares {split}"
        )
    if end == summary.sequences:
        return summary.tokens
    _, offsets, _ = map_index(prefix, summary)
    return int(offsets[end]) // summary.dtype.itemsize


def check_enough(found: int, wanted: int, *, flag: str, sequence: int, split: str) -> None:
    """Refuse data that end before the run; several data sets without weights are read once.

    Args:
        found: samples of the data.
        wanted: samples that the run reads.
        flag: that named the data.
        sequence: tokens of a sample.
        split: name of the split.

    Raises:
        DataError: names the flag, the split and both numbers.
    """
    if found < wanted:
        raise DataError(
            f"{flag}: expected at least {wanted} samples of {sequence} tokens in the {split} split, which is "
            f"what the run reads, found {found}; data sets without weights are read once, those with "
            "weights as often as needed"
        )


def bare_prefix(name: str) -> str:
    """A prefix, also of a file that the shell has found for ``data/web_*.idx``."""
    path = Path(name)
    return str(path.with_suffix("")) if path.suffix in (".idx", ".bin") else name


def _whole(exact: Sequence[float], total: int) -> list[int]:
    """Whole numbers next to these that add up to the total: the largest remainders are rounded up."""
    down = np.floor(exact).astype(np.int64)
    remainders = np.asarray(exact) - down
    up = np.argsort(-remainders, kind="stable")[: total - int(down.sum())]
    down[up] += 1
    return [int(number) for number in down]
