"""How often a run reads each of its datasets."""

from __future__ import annotations

import math
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from megatron_ext.data.blend import check_enough, training_tokens
from megatron_ext.data.indexed import read_index_summary
from megatron_ext.data.manifest import check_prefix
from megatron_ext.data.shares import check_documents, missing_share, needed_splits, split_shares
from megatron_ext.exceptions import ConfigError, DataError


class DataTokenizer(NamedTuple):
    """What data are checked for.

    Attributes:
        vocab_size: its ids.
        eod_id: that ends a document, None if it has none.
        digest: of its model.
    """

    vocab_size: int
    eod_id: int | None
    digest: str


@dataclass(frozen=True)
class DatasetUse:
    """How often a run reads a dataset: `epochs = used / tokens`, both of the training split."""

    prefix: str
    share: float
    tokens: float
    used: float

    @property
    def epochs(self) -> float:
        """Times that the training split is read."""
        return self.used / self.tokens


def dataset_uses(blend: Sequence[str], *, tokens: float, split: str) -> list[DatasetUse]:
    """Spread a run's tokens over a blend in Megatron's syntax, `[weight] prefix ...`.

    Args:
        blend: one prefix, weights and prefixes in turn, or prefixes alone (shares by size).
        tokens: tokens that the run reads of the blend.
        split: Megatron's `--split`.

    Raises:
        ConfigError: a split that leaves nothing to train on, or a weight that no run takes.
        DataError: a dataset is missing or broken.
    """
    weights, prefixes = _parse_blend(blend)
    for weight, prefix in zip(weights, prefixes, strict=False):
        if not 0 < weight < math.inf:
            raise ConfigError(f"{prefix}: expected a weight above 0, found {weight:g}")
    sizes = [float(training_tokens(prefix, split)) for prefix in prefixes]
    weights = weights or sizes
    shares = [weight / sum(weights) for weight in weights]
    return [
        DatasetUse(prefix, share, size, share * tokens)
        for prefix, share, size in zip(prefixes, shares, sizes, strict=True)
    ]


def check_made_with(blend: Sequence[str], tokenizer: DataTokenizer, *, flag: str) -> None:
    """Refuse data of another tokenizer, as the run does.

    Args:
        blend: in Megatron's syntax.
        tokenizer: of the run.
        flag: that named the blend.

    Raises:
        DataError: names the flag and the file.
    """
    for prefix in dict.fromkeys(_parse_blend(blend)[1]):
        try:
            check_prefix(
                prefix,
                vocab_size=tokenizer.vocab_size,
                tokenizer_digest=tokenizer.digest,
                eod_id=tokenizer.eod_id,
            )
        except DataError as error:
            raise DataError(f"{flag}: {error}") from error


def check_split(blend: Sequence[str], *, flags: Namespace, flag: str) -> None:
    """Refuse data of which a split that the run reads gets nothing, as the run does.

    Args:
        blend: in Megatron's syntax.
        flags: of the entry point.
        flag: that named the blend.

    Raises:
        ConfigError: a split has no share.
        DataError: no document falls into a share.
    """
    shares = split_shares(flags.split)
    for name, (purpose, way_out) in needed_splits(flags).items():
        if shares[name] is None:
            raise missing_share(flag, flags.split, purpose, way_out)
    for prefix in dict.fromkeys(_parse_blend(blend)[1]):
        sequences = read_index_summary(prefix).sequences
        check_documents(prefix, sequences, shares, flag=flag, split=flags.split)


def check_samples(
    blend: Sequence[str], *, wanted: int, sequence: int, split: str, flag: str
) -> None:
    """Refuse several data sets without weights, which are read once, that end before the run.

    Args:
        blend: in Megatron's syntax.
        wanted: samples that the run reads of it.
        sequence: tokens of a sample; the last one predicts a token more.
        split: Megatron's `--split`.
        flag: that named the blend.

    Raises:
        DataError: names the flag and both numbers.
    """
    weights, prefixes = _parse_blend(blend)
    if weights or len(prefixes) == 1:
        return
    found = sum((training_tokens(prefix, split) - 1) // sequence for prefix in prefixes)
    check_enough(found, wanted, flag=flag, sequence=sequence, split="train")


def _parse_blend(blend: Sequence[str]) -> tuple[list[float], list[str]]:
    """Weights, if there are any, and prefixes; the same rule as Megatron's."""
    if len(blend) % 2 == 0:
        try:
            return [float(weight) for weight in blend[::2]], list(blend[1::2])
        except ValueError:
            pass
    return [], list(blend)
