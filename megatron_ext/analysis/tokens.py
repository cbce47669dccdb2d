"""Structural tokens: what a set of text uses far more often than another, and all over its documents.

Source: figure 3 of arXiv 2406.12397. There, kernel densities over the token ids of synthetic and real text
differ in a few small peaks, which are words such as "question", "answer" and "summary". Here the peaks are
found in the difference of two densities and named, and their over-use is measured.

Legend: V ids of the vocabulary, D documents of a set, K tokens that are looked at.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.ndimage import gaussian_filter1d
from scipy.signal import find_peaks

from megatron_ext.analysis.statistics import REPLICATES, interval, resampled_sums
from megatron_ext.exceptions import DataError

# Peaks that are looked at, by their prominence.
_MAX_PEAKS = 60
# Neighbours in a peak are named if their excess is at least this share of the largest one's.
_SHARE_OF_PEAK = 0.25
# A structural token is used at least this many times as often (by the lower end of the interval), and in
# at least this share of the documents; a token of one topic is in few of them.
MIN_RATIO, MIN_DOCUMENTS = 2.0, 0.2


@dataclass(frozen=True)
class TokenCounts:
    """Tokens of the samples of one set, special ids left out.

    Attributes:
        samples: int64 arrays, one a document.
        counts: int64 ``[V]``, occurrences.
        documents: int64 ``[V]``, documents that hold the token.
    """

    samples: Sequence[np.ndarray]
    counts: np.ndarray
    documents: np.ndarray

    @property
    def total(self) -> int:
        """Tokens of all samples."""
        return int(self.counts.sum())

    @property
    def rates(self) -> np.ndarray:
        """fp64 ``[V]``, share of each token."""
        return self.counts / self.total


@dataclass(frozen=True)
class Overuse:
    """A token in a peak, and how much more often a set uses it than the baseline does.

    Attributes:
        token: its id.
        peak: id at which the peak stands.
        ratio: rate in the set over rate in the baseline.
        low: lower end of the ratio's 95% interval.
        high: upper end.
        count: occurrences in the set.
        baseline_count: occurrences in the baseline.
        rate: share of the set's tokens.
        baseline_rate: share of the baseline's tokens.
        documents: share of the set's documents that hold it.
        baseline_documents: share of the baseline's documents.
    """

    token: int
    peak: int
    ratio: float
    low: float
    high: float
    count: int
    baseline_count: int
    rate: float
    baseline_rate: float
    documents: float
    baseline_documents: float

    @property
    def structural(self) -> bool:
        """Whether it is over-used beyond doubt, and throughout the set."""
        return self.low >= MIN_RATIO and self.documents >= MIN_DOCUMENTS


def count_tokens(
    samples: Sequence[np.ndarray], *, vocab_size: int, special: Sequence[int], name: str
) -> TokenCounts:
    """Count the tokens of a set.

    Args:
        samples: int64 arrays, one a document.
        vocab_size: V.
        special: ids that are not counted: how often they occur says how long documents are.
        name: the set, for messages.

    Raises:
        DataError: an id beyond the vocabulary, or nothing to count.
    """
    counts = np.zeros(vocab_size, dtype=np.int64)
    documents = np.zeros(vocab_size, dtype=np.int64)
    kept = []
    for sample in samples:
        if sample.max() >= vocab_size:
            raise DataError(
                f"{name}: expected token ids below {vocab_size}, the tokenizer's size, found {sample.max()}"
            )
        text = sample[~np.isin(sample, special)]
        if len(text):
            ids, occurrences = np.unique(text, return_counts=True)
            counts[ids] += occurrences
            documents[ids] += 1
            kept.append(text)
    if len(kept) < 2:
        raise DataError(f"{name}: expected at least 2 documents with text, found {len(kept)}")
    return TokenCounts(kept, counts, documents)


def density(rates: np.ndarray, *, bandwidth: float) -> np.ndarray:
    """Gaussian kernel density over token ids, fp64 ``[V]``; it sums to the sum of the rates.

    Args:
        rates: fp64 ``[V]``.
        bandwidth: standard deviation of the kernel, in ids.
    """
    # The ends reflect, so that no mass is lost beyond the first and the last id.
    return gaussian_filter1d(rates, bandwidth, mode="reflect", truncate=5.0)


def find_overuse(
    counts: TokenCounts, baseline: TokenCounts, *, bandwidth: float, seed: int
) -> list[Overuse]:
    """Find the peaks in which a set's density exceeds the baseline's, and measure the tokens in them.

    Args:
        counts: of the set.
        baseline: of the set it is compared with.
        bandwidth: of the kernel, in ids.
        seed: of the bootstrap.

    Returns:
        The tokens, the most over-used first, by the lower end of the interval.
    """
    excess = counts.rates - baseline.rates
    peaks = _peaks(excess, bandwidth=bandwidth)
    tokens = np.array(sorted(peaks), dtype=np.int64)
    generator = np.random.default_rng(seed)
    ratio, low, high = _ratios(counts, baseline, tokens, generator)
    found = [
        Overuse(
            token=int(token),
            peak=peaks[int(token)],
            ratio=float(ratio[i]),
            low=float(low[i]),
            high=float(high[i]),
            count=int(counts.counts[token]),
            baseline_count=int(baseline.counts[token]),
            rate=float(counts.rates[token]),
            baseline_rate=float(baseline.rates[token]),
            documents=float(counts.documents[token] / len(counts.samples)),
            baseline_documents=float(baseline.documents[token] / len(baseline.samples)),
        )
        for i, token in enumerate(tokens)
    ]
    return sorted(found, key=lambda item: -item.low)


def _peaks(excess: np.ndarray, *, bandwidth: float) -> dict[int, int]:
    """The peak of each token that makes one, by token id."""
    smooth = density(excess, bandwidth=bandwidth)
    # A peak at the first or the last id has a lower neighbour on one side only.
    places, properties = find_peaks(np.pad(smooth, 1), prominence=0.0, height=0.0)
    largest = places[np.argsort(-properties["prominences"], kind="stable")][:_MAX_PEAKS] - 1
    reach = max(1, round(2 * bandwidth))
    owners: dict[int, int] = {}
    for peak in map(int, largest):
        ids = np.arange(max(0, peak - reach), min(len(excess), peak + reach + 1))
        strong = ids[excess[ids] >= max(_SHARE_OF_PEAK * excess[ids].max(), 1e-12)]
        for token in map(int, strong):
            if token not in owners or abs(token - peak) < abs(token - owners[token]):
                owners[token] = peak
    return owners


def _ratios(
    counts: TokenCounts,
    baseline: TokenCounts,
    tokens: np.ndarray,
    generator: np.random.Generator,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Ratio of the rates of K tokens and its 95% interval, each fp64 ``[K]``.

    Half an occurrence is added to each count, so that a token which the baseline lacks has a finite ratio.
    Documents are resampled, not tokens: within a document, tokens depend on each other. A count of 0 stays
    0 in every resample, so the half is drawn from Gamma(1/2, 1) there: that makes the interval the one of
    Jeffreys' prior for a Poisson rate where nothing was counted, and changes nothing where much was.
    """
    point, drawn = [], []
    for part in (counts, baseline):
        table = _per_document(part.samples, tokens)
        sums = table.sum(axis=0)
        point.append((sums[:-1] + 0.5) / sums[-1])
        replicates = resampled_sums(table, generator=generator)
        noise = generator.gamma(0.5, size=(REPLICATES, len(tokens)))
        drawn.append((replicates[:, :-1] + noise) / replicates[:, -1:])
    low, high = interval(drawn[0] / np.maximum(drawn[1], 1e-300))
    return point[0] / point[1], low, high


def _per_document(samples: Sequence[np.ndarray], tokens: np.ndarray) -> np.ndarray:
    """Occurrences of K tokens in each document, and its length: fp64 ``[D, K + 1]``."""
    table = np.zeros((len(samples), len(tokens) + 1))
    for row, sample in zip(table, samples, strict=True):
        if len(tokens):
            place = np.minimum(np.searchsorted(tokens, sample), len(tokens) - 1)
            row[:-1] = np.bincount(place[tokens[place] == sample], minlength=len(tokens))
        row[-1] = len(sample)
    return table
