"""Perplexities, and bootstrap confidence intervals over samples."""

from __future__ import annotations

import numpy as np

REPLICATES = 1000
LEVEL = 0.95

# Replicates that are drawn at a time: weights of 16 replicates over 100,000 samples take 13 MB.
_CHUNK = 16


def resampled_sums(
    values: np.ndarray, *, generator: np.random.Generator, replicates: int = REPLICATES
) -> np.ndarray:
    """Sums over rows that are drawn with replacement.

    Args:
        values: fp64 ``[n, k]``, one row a sample. Rows stay whole, so columns are resampled in pairs.
        generator: of the draws.
        replicates: how often.

    Returns:
        fp64 ``[replicates, k]``.
    """
    count = len(values)
    share = np.full(count, 1 / count)
    parts = []
    for start in range(0, replicates, _CHUNK):
        rows = min(_CHUNK, replicates - start)
        weights = generator.multinomial(count, share, size=rows)
        parts.append(weights.astype(np.float64) @ values)
    return np.concatenate(parts)


def interval(replicates: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Ends of the percentile interval of each column of ``[replicates, k]``."""
    low, high = np.quantile(replicates, ((1 - LEVEL) / 2, (1 + LEVEL) / 2), axis=0)
    return low, high


def perplexity(loss: np.ndarray | float) -> np.ndarray:
    """Perplexities of losses in nats, of any shape, at most e^300.

    Beyond that, where gradient ascent may end, its square is no number, and soon it is none itself.
    """
    return np.asarray(np.exp(np.minimum(loss, 300.0)))
