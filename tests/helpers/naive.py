"""Ground truth: the objective in fp64, over the whole vocabulary, as a textbook writes it.

Gradients are autograd's. The bounds are those that the product promises.
"""

from collections.abc import Callable

import torch
from torch import Tensor


def target_margin(logits: Tensor, labels: Tensor, *, vocab_size: int | None = None) -> Tensor:
    """`z_y - ln sum_{j != y} exp z_j`: `[..., V]`, `[...]` to `[...]` fp64."""
    z = logits.double()[..., :vocab_size]
    at_label = torch.nn.functional.one_hot(labels.long(), z.shape[-1]).bool()
    rest = z.masked_fill(at_label, -torch.inf).logsumexp(-1)
    return z.gather(-1, labels.long().unsqueeze(-1)).squeeze(-1) - rest


def reference_kl(
    logits: Tensor, reference_logits: Tensor, *, vocab_size: int | None = None
) -> Tensor:
    """`sum_j p_t(j) (ln p_t(j) - ln p_z(j))`: `[..., V]` twice to `[...]` fp64."""
    log_p = logits.double()[..., :vocab_size].log_softmax(-1)
    log_t = reference_logits.double()[..., :vocab_size].log_softmax(-1)
    return (log_t.exp() * (log_t - log_p)).sum(-1)


def softplus(a: Tensor) -> Tensor:
    """`ln(1 + exp a)`, without the threshold of torch's softplus."""
    return torch.logaddexp(a, torch.zeros_like(a))


OBJECTIVES: dict[str, Callable[[Tensor], Tensor]] = {
    "cross_entropy": lambda a: softplus(-a),
    "bounded_forgetting": softplus,
    "gradient_ascent": lambda a: -softplus(-a),
}

# The step between neighbouring numbers at the bottom of fp32. What lies below 1e-38, such as the
# cross-entropy of a margin of 100, cannot be had more exactly in fp32.
SMALLEST = 2.0**-149
# What fp64 leaves of `p_z - p_t`, and of a KL, when they are 0.
TRUTH_NOISE = 2e-15


def tolerance(margin: Tensor) -> Tensor:
    """Promised relative error of values and gradients for true margins `[...]`."""
    return torch.where(margin.abs() <= 20, 1e-5, 1e-4).double()


def divergence_noise(logits: Tensor) -> float:
    """What fp64 leaves of a row of `p_z - p_t` when it is 0: it grows with the logits' offset."""
    return TRUTH_NOISE * float(logits.abs().max().clamp(1.0, 1e4))


def assert_values(
    actual: Tensor,
    expected: Tensor,
    bound: Tensor | float,
    *,
    floor: float = 0.0,
    noise: float = SMALLEST,
) -> None:
    """Asserts `|actual - expected| <= bound * max(|expected|, floor)`, element by element."""
    error = (actual.double() - expected).abs()
    allowed = bound * expected.abs().clamp_min(floor) + noise
    _assert_within(error, allowed, expected)


def assert_gradient(
    actual: Tensor, expected: Tensor, bound: Tensor | float, *, noise: float = 0.0
) -> None:
    """Asserts `|actual - expected|_1 <= bound * |expected|_1`, row by row of `[..., V]`."""
    error = (actual.double() - expected).abs().sum(-1)
    norm = expected.abs().sum(-1)
    _assert_within(error, bound * norm + SMALLEST * expected.shape[-1] + noise, norm)


def _assert_within(error: Tensor, allowed: Tensor, expected: Tensor) -> None:
    bad = ~(error <= allowed)  # also where the error is nan
    if bad.any():
        error, allowed, expected = (x.expand_as(bad)[bad] for x in (error, allowed, expected))
        raise AssertionError(
            f"{len(error)} of {bad.numel()} beyond the bound; at {bad.nonzero().tolist()[:9]}: "
            f"error {error[:9]}, allowed {allowed[:9]}, expected {expected[:9]}"
        )
