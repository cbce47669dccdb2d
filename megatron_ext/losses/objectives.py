"""Token-level objectives as functions of the target margin `a`, the log-odds of p(y).

| objective | in terms of p | value | derivative |
|---|---|---|---|
| cross-entropy | `-ln p` | `softplus(-a)` | `-sigmoid(-a)` |
| bounded forgetting | `-ln(1 - p)` | `softplus(a)` | `sigmoid(a)` |
| gradient ascent | `ln p` | `-softplus(-a)` | `sigmoid(-a)` |

Source: arXiv 2406.12397, which proposes bounded forgetting; gradient ascent is its baseline.

`softplus` of torch is accurate at both ends: `log1p(exp(a))` up to its threshold, 20, where nothing
cancels, and `a` above it, where the two differ by 1e-10 of the value. From a margin of 87 on, the
cross-entropy is below the smallest normal fp32 number, and fades to 0.
"""

from collections.abc import Callable
from types import MappingProxyType

import torch.nn.functional as F  # noqa: N812 (its usual name)
from torch import Tensor


def cross_entropy(margin: Tensor) -> Tensor:
    """`-ln p`, to learn or replay a token. `[...]` to `[...]`, in nats, minimised."""
    return F.softplus(-margin)


def bounded_forgetting(margin: Tensor) -> Tensor:
    """`-ln(1 - p)`, to forget a token. `[...]` to `[...]`, in nats, minimised.

    Its gradient `sigmoid(a)` fades as the token is forgotten, and is 1 at most.
    """
    return F.softplus(margin)


def gradient_ascent(margin: Tensor) -> Tensor:
    """`ln p`, cross-entropy turned around. `[...]` to `[...]`, in nats, minimised.

    Unbounded below: its gradient `sigmoid(-a)` grows as the token is forgotten.
    """
    return -F.softplus(-margin)


# The values of `--forget-loss`.
FORGET_LOSSES: MappingProxyType[str, Callable[[Tensor], Tensor]] = MappingProxyType(
    {"bounded": bounded_forgetting, "gradient-ascent": gradient_ascent}
)
