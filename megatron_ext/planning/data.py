"""How often a run reads each of its datasets."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_ext.data.blend import training_tokens
from megatron_ext.exceptions import ConfigError


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


def _parse_blend(blend: Sequence[str]) -> tuple[list[float], list[str]]:
    """Weights, if there are any, and prefixes; the same rule as Megatron's."""
    if len(blend) % 2 == 0:
        try:
            return [float(weight) for weight in blend[::2]], list(blend[1::2])
        except ValueError:
            pass
    return [], list(blend)
