"""Shifts of perplexity: pairs of scores, intervals, and models that ran away."""

import json

import numpy as np
import pytest

from megatron_ext.analysis.figures import colour, line, marker, render
from megatron_ext.analysis.measure import _check_finite
from megatron_ext.analysis.perplexity import SampleScores
from megatron_ext.analysis.perplexity_report import (
    add_shifts,
    perplexity_panels,
    perplexity_table,
)
from megatron_ext.exceptions import CheckpointError

N = 400


def report_of(**losses):
    models = {
        f"runs/{name}": {
            "label": name,
            "sets": {
                "text": {
                    "loss": loss.tolist(),
                    "probability": np.exp(-loss).tolist(),
                    "tokens": list(range(1, len(loss) + 1)),
                    "corpus_perplexity": 1.0,
                }
            },
        }
        for name, loss in losses.items()
    }
    report = {"models": models}
    add_shifts(report, seed=1)
    return report, {
        name: report["models"][f"runs/{name}"]["sets"]["text"]["summary"] for name in losses
    }


@pytest.fixture(scope="module")
def losses():
    rng = np.random.default_rng(3)
    base = rng.normal(3.0, 1.0, N)
    # Samples differ by 1 from each other and by 0.1 from themselves under the other model.
    return {"base": base, "synth": 3.0 + 0.5 * (base - 3.0) - 0.2 + rng.normal(0, 0.1, N)}


def test_mean_and_variance(losses):
    _, found = report_of(**losses)
    for name, loss in losses.items():
        for kind, values in (("loss", loss), ("perplexity", np.exp(loss))):
            assert found[name][kind]["mean"] == pytest.approx(values.mean())
            assert found[name][kind]["variance"] == pytest.approx(values.var(ddof=1))
    assert "shift" not in found["base"]["loss"]


def test_shift_is_measured_in_pairs(losses):
    _, found = report_of(**losses)
    difference = losses["synth"] - losses["base"]
    shift = found["synth"]["loss"]["shift"]
    assert shift["value"] == pytest.approx(difference.mean())
    half = 1.96 * difference.std(ddof=1) / N**0.5
    assert shift["low"] == pytest.approx(difference.mean() - half, abs=0.15 * half)
    assert shift["high"] == pytest.approx(difference.mean() + half, abs=0.15 * half)
    # Resampling each model by itself would widen it.
    apart = 1.96 * ((losses["synth"].var() + losses["base"].var()) / N) ** 0.5
    assert shift["high"] - shift["low"] < 0.6 * 2 * apart
    ratio = found["synth"]["loss"]["variance_ratio"]
    assert ratio["value"] == pytest.approx(losses["synth"].var() / losses["base"].var())
    assert 0.2 < ratio["low"] < ratio["value"] < ratio["high"] < 0.32


def test_intervals_cover_the_truth():
    """Of 60 draws without any shift, about 3 exclude 0."""
    rng = np.random.default_rng(4)
    missed = 0
    for _ in range(60):
        base = rng.normal(3, 1, 100)
        _, found = report_of(base=base, other=base + rng.normal(0, 0.3, 100))
        shift = found["other"]["loss"]["shift"]
        missed += not shift["low"] <= 0 <= shift["high"]
    assert missed <= 9


def test_the_table_shows_the_mean_probability_of_tokens(losses):
    """What --min-forget-probability is compared with: a long sample counts by its tokens."""
    report, _ = report_of(**losses)
    header, *rows = perplexity_table(report).splitlines()[1:4]
    assert header.split()[:3] == ["model", "perplexity", "mean"]
    weights = np.arange(1, N + 1)
    for row, (name, loss) in zip(rows, losses.items(), strict=True):
        expected = (np.exp(-loss) * weights).sum() / weights.sum()
        assert row.split()[:3] == [name, "1.00", f"{expected:.4f}"]
        assert f"{expected:.4f}" != f"{np.exp(-loss).mean():.4f}"


def test_a_model_that_ran_away(losses):
    report, found = report_of(**losses, ascent=losses["base"] + 900.0)
    assert found["ascent"]["loss"]["shift"]["value"] == pytest.approx(900.0)
    json.dumps(report, allow_nan=False)
    assert "+900.000" in perplexity_table(report)
    assert render(perplexity_panels(report)).startswith(b"\x89PNG")


def test_the_perplexity_of_a_model_that_ran_away_can_be_written():
    far = SampleScores(np.array([900.0, 800.0]), np.zeros(2), np.array([3, 4]))
    json.dumps(far.corpus_perplexity, allow_nan=False)
    near = SampleScores(np.array([2.0, 4.0]), np.zeros(2), np.array([1, 3]))
    assert near.corpus_perplexity == pytest.approx(np.exp(3.5))


def test_losses_that_are_no_numbers_are_named():
    _check_finite(np.array([1.0, 900.0]), "runs/ga", "real")
    with pytest.raises(CheckpointError, match=r"runs/ga: .* 2 of 3 samples of real"):
        _check_finite(np.array([1.0, np.nan, np.inf]), "runs/ga", "real")


def test_samples_that_are_all_alike():
    report, found = report_of(base=np.full(5, 2.0), same=np.full(5, 2.0), one=np.full(5, 3.0))
    assert found["same"]["loss"]["shift"] == {"value": 0.0, "low": 0.0, "high": 0.0}
    assert "variance_ratio" not in found["same"]["loss"]
    json.dumps(report, allow_nan=False)
    assert render(perplexity_panels(report)).startswith(b"\x89PNG")


@pytest.mark.parametrize("shape", [line, marker])
def test_no_two_series_look_the_same(shape):
    assert len({(colour(index), shape(index)) for index in range(20)}) == 20
