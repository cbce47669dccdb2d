"""Whether `--split` leaves each split that a run reads a share of the data, and a document."""

from __future__ import annotations

import itertools
import re
from argparse import Namespace
from collections.abc import Mapping

from megatron_ext.exceptions import ConfigError, DataError

_SPLITS = ("train", "valid", "test")

# Bounds of each split's part of the documents, from 0 to 1; None for no part.
Shares = Mapping[str, tuple[float, float] | None]


def split_shares(split: str) -> Shares:
    """What Megatron makes of `--split`.

    Raises:
        ConfigError: it is not up to three shares, one of them above 0.
    """
    try:
        parts = [float(part) for part in re.findall(r"[.0-9]+", split)]
    except ValueError:
        parts = [0.0] * 4
    if len(parts) > len(_SPLITS):
        raise ConfigError(f"--split: expected up to three shares, found {split}")
    parts += [0.0] * (len(_SPLITS) - len(parts))
    total = parts[0] + parts[1] + parts[2]  # as numpy adds them; Python's sum rounds once
    if not total > 0:
        raise ConfigError(f"--split: expected a share above 0, found {split}")
    ends = list(itertools.accumulate(part / total for part in parts))
    bounds = zip([0.0, *ends], ends, strict=False)
    return {name: (a, b) if b > a else None for name, (a, b) in zip(_SPLITS, bounds, strict=True)}


def needed_splits(args: Namespace) -> dict[str, tuple[str, str]]:
    """The splits that a run cannot do without: what each is for, and the flag that does without it.

    Args:
        args: the run's, with `skip_train` and `eval_iters`.
    """
    needed = {} if args.skip_train else {"train": ("training", "--skip-train")}
    if args.eval_iters > 0:
        needed["valid"] = (f"validation (--eval-iters {args.eval_iters})", "--eval-iters 0")
    return needed


def missing_share(flag: str, split: str, purpose: str, way_out: str) -> ConfigError:
    """What to raise for a blend of which a split that is needed gets no share.

    Args:
        flag: that named the blend.
        split: Megatron's `--split`.
        purpose: of the split.
        way_out: flag that does without it.
    """
    return ConfigError(
        f"--split: expected a share of {flag} for {purpose}, found {split}, or use {way_out}"
    )


def check_documents(
    prefix: str, sequences: int, shares: Shares, *, flag: str, split: str | None
) -> None:
    """Refuse a share into which no document falls; Megatron would never return from building it.

    Args:
        prefix: of the data set.
        sequences: that it has.
        shares: of the splits.
        flag: that named the blend.
        split: Megatron's `--split`.

    Raises:
        DataError: names the flag, the data set and the split.
    """
    for name, share in shares.items():
        if share is None:
            continue
        first, end = (round(bound * float(sequences)) for bound in share)  # as Megatron
        if first == end:
            raise DataError(
                f"--split: expected at least one document of {flag} {prefix} for the {name} split, found "
                f"none of its {sequences} with shares {split}"
            )
