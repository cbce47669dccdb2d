"""Standard errors of scores: how far they would lie apart with other questions of the same kind.

Answers to one question, turn after turn or with one more constraint each, rise and fall together: as many
independent ones would make the error look smaller than it is. So questions are the units, not answers. What
a judge would say another time, or another judge, is in no such error.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from statistics import fmean


def clustered_error[T](
    clusters: Sequence[Sequence[T]], statistic: Callable[[Sequence[T]], float | None]
) -> float | None:
    """Standard error of a statistic of members of independent clusters.

    The jackknife that leaves out one cluster at a time (Efron and Tibshirani, An Introduction to the
    Bootstrap, 1993, chapter 11). With ``t_g`` the statistic without cluster g of G::

        error^2 = (G - 1) / G * sum_g (t_g - mean_h t_h)^2

    For a mean over clusters of one size that is ``s / sqrt(G)`` with ``s`` the standard deviation of the
    clusters' means, and up to terms of order 1/G the clustered error of arXiv 2411.00640. It serves ratios
    as well, such as means of levels where members are missing.

    Args:
        clusters: members of each.
        statistic: of members, in their order; ``None`` where it has no value.

    Returns:
        In the unit of the statistic; ``None`` with fewer than two clusters, or where the statistic has no
        value without one of them.
    """
    if len(clusters) < 2:
        return None
    left_out = []
    for g in range(len(clusters)):
        value = statistic([*chain(*clusters[:g], *clusters[g + 1 :])])
        if value is None:
            return None
        left_out.append(value)
    mean, count = fmean(left_out), len(left_out)
    return math.sqrt((count - 1) / count * math.fsum((value - mean) ** 2 for value in left_out))


def error_of_mean(errors: Iterable[float | None]) -> float | None:
    """Standard error of a mean of n scores of independent questions: ``sqrt(sum_i error_i^2) / n``.

    Returns:
        ``None`` if there are none, or one of them is not known.
    """
    known = list(errors)
    if not known or None in known:
        return None
    return math.hypot(*(error for error in known if error is not None)) / len(known)


def with_error(value: float | None, error: float | None, *, digits: int = 2) -> str:
    """A score as tables show it, ``5.43 ± 0.21``: without ± where the error is not known, ``-`` for none."""
    if value is None:
        return "-"
    return f"{value:.{digits}f}" + ("" if error is None else f" ± {error:.{digits}f}")


def aligned(cells: Sequence[str]) -> list[str]:
    """A column of such scores, filled with spaces so that values and errors stand below one another."""
    parts = [cell.partition(" ±") for cell in cells]
    values, errors = (max(len(value) for value, *_ in parts), max(len(e) for *_, e in parts))
    width = errors + len(" ±") if errors else 0
    return [value.rjust(values) + (sign + error).ljust(width) for value, sign, error in parts]
