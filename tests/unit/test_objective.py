"""The terms of a batch and their weighted sum, by the definitions in fp64."""

import math

import pytest
import torch

from megatron_ext.config import UnlearnConfig
from megatron_ext.objective import Objective

WEIGHTS = {"forget_weight": 0.5, "replay_weight": 0.7, "mitigation_weight": 1.3}
MASK = torch.tensor([-1.0, 0.0, 1.0, -1.0, 1.0, 1.0, 0.0, -1.0])
COUNTED = torch.tensor([7.0, 11.0]).double()  # of the global batch, of which MASK is a part


def objective(**changes):
    return Objective(UnlearnConfig(forget_data_path=["qa"], **WEIGHTS | changes))


def terms():
    """Margins, KLs (also of tokens that have none in a run) and the reference's margins."""
    found = torch.randn(3, len(MASK), generator=torch.Generator().manual_seed(0))
    found[1].abs_()
    return found


def expected():
    """Means of the terms, over tokens of which the other microbatches have sums of 0."""
    p, reference = (torch.sigmoid(margin.double()) for margin in terms()[[0, 2]])
    forget, replay = MASK < 0, MASK > 0
    means = {
        "forget loss": -(1 - p)[forget].log().sum() / COUNTED[0],
        "replay loss": -p[replay].log().sum() / COUNTED[1],
        "mitigation kl": terms()[1].double()[replay].sum() / COUNTED[1],
        "forget token probability": p[forget].sum() / COUNTED[0],
        "reference replay loss": -reference[replay].log().sum() / COUNTED[1],
    }
    return {name: float(mean) for name, mean in means.items()}


def test_each_term_is_a_mean_over_its_own_tokens_of_the_global_batch():
    made, means = objective(max_replay_increase=1.0), expected()
    sums = made.sums(terms(), MASK)
    assert sums.dtype == torch.float64
    total = 0.5 * means["forget loss"] + 0.7 * means["replay loss"] + 1.3 * means["mitigation kl"]
    derived = {"unlearn loss": total, "replay perplexity": math.exp(means["replay loss"])}
    derived["replay increase"] = means["replay loss"] - means["reference replay loss"]
    found = {name: float(value) for name, value in made.metrics(sums, COUNTED).items()}
    assert found == pytest.approx(means | derived, rel=1e-6, abs=1e-7)  # fp32; one is a difference
    assert float(made.loss(sums, COUNTED)) == pytest.approx(total, rel=1e-6)


def test_its_gradient_is_that_of_the_three_terms():
    given = terms().requires_grad_()
    made = objective(max_replay_increase=1.0)
    made.loss(made.sums(given, MASK), COUNTED).backward()
    p = torch.sigmoid(terms()[0])
    forget, replay = (MASK < 0) / COUNTED[0], (MASK > 0) / COUNTED[1]
    torch.testing.assert_close(given.grad[0], (0.5 * forget * p - 0.7 * replay * (1 - p)).float())
    torch.testing.assert_close(given.grad[1], (1.3 * replay).float())
    assert not given.grad[2].any()


@pytest.mark.parametrize("role", [-1, 1])
def test_a_role_without_tokens_counts_for_nothing(role):
    """Neither in the loss of its batch nor in the mean over the batches of a validation."""
    made = objective()
    alone = torch.where(role == MASK, MASK, 0)
    counted = torch.stack(((alone < 0).sum(), (alone > 0).sum())).double()
    sums = made.sums(terms()[:2], alone)
    assert made.loss(sums, counted).isfinite()
    fractions = made.fractions(sums, counted)
    whole = made.fractions(made.sums(terms()[:2], MASK), COUNTED)
    without = "replay loss" if role < 0 else "forget loss"
    assert float(made.metrics(sums, counted)[without]) == 0
    numerator, denominator = whole[without] + fractions[without]
    assert float(numerator / denominator) == pytest.approx(expected()[without], rel=1e-6)


def test_what_a_run_has_not_is_not_logged():
    made = objective(mitigation_weight=0.0)
    found = made.metrics(made.sums(terms()[:2], MASK), COUNTED)
    assert list(found) == [
        *("unlearn loss", "forget loss", "replay loss", "forget token probability"),
        "replay perplexity",
    ]
