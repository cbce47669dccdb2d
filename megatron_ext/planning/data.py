"""How often a run reads each of its datasets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_ext.data.indexed import read_index_summary
from megatron_ext.exceptions import ConfigError

# Up to 4 epochs repeated data is nearly as good as new data (arXiv 2305.16264, section 6).
MAX_EPOCHS = 4.0


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
        split: Megatron's `--split`; it divides documents, so tokens only on average.

    Raises:
        ConfigError: a split that leaves nothing to train on.
        DataError: a dataset is missing or broken.
    """
    weights, prefixes = _parse_blend(blend)
    parts = [float(part) for part in split.split(",")]
    if not sum(parts) or not parts[0]:
        raise ConfigError(f"--split: expected a share for training, found {split}")
    sizes = [read_index_summary(prefix).tokens * parts[0] / sum(parts) for prefix in prefixes]
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
