"""What a run logs, and that the rarer kinds of run end with sane values."""

import math
import re

import pytest

from tests.helpers.entry import METRICS, Launch
from tests.helpers.tiny import write_tokens
from tests.integration.conftest import HALF, STEPS

SHORT = ("--train-iters", 4, "--eval-iters", 1)


@pytest.fixture(scope="module")
def runs(tiny, server, runs_directory):
    """Short runs of every rarer kind."""
    # Every token ends a document, so with --eod-mask-loss none counts.
    nothing = write_tokens(runs_directory / "nothing_text_document", documents=2000)
    no_forget = tiny.unlearn(*SHORT, "--forget-data-path", nothing)
    no_replay = tiny.unlearn(*SHORT, "--data-path", nothing)
    bf16 = ("--bf16", "--tensor-model-parallel-size", 2, "--sequence-parallel")
    launches = {
        "no forget tokens": Launch(no_forget),
        "no replay tokens": Launch(no_replay),
        "bf16": Launch(tiny.unlearn(*SHORT, *bf16), ranks=2),
        "fp32": Launch(tiny.unlearn(*SHORT)),
        "gradient ascent": Launch(tiny.unlearn(*SHORT, "--forget-loss", "gradient-ascent")),
    }
    return server.run_all(launches, runs_directory / "metrics")


def all_values(run):
    return [value for tag in METRICS for value in run.series(tag)] + [
        value for tag in METRICS for value in run.series(f"{tag} validation")
    ]


def test_training_and_validation_log_every_metric(straight):
    for tag in METRICS:
        assert sorted(straight.scalars[tag]) == list(range(1, STEPS + 1))
        assert sorted(straight.scalars[f"{tag} validation"]) == [HALF, STEPS]


def test_metrics_fit_together(straight):
    for suffix in ("", " validation"):
        series = {tag: straight.series(f"{tag}{suffix}") for tag in METRICS}
        for total, forget, replay, kl, probability, perplexity in zip(
            *series.values(), strict=True
        ):
            assert total == pytest.approx(0.5 * forget + 0.7 * replay + 1.3 * kl, rel=1e-6)
            assert perplexity == pytest.approx(math.exp(replay), rel=1e-6)
            assert 0 < probability < 1
            # -log(1 - p) is convex in p.
            assert forget >= -math.log(1 - probability)


def test_console_shows_the_same(straight):
    lines = [line for line in straight.output.splitlines() if f" iteration {STEPS:8d}/" in line]
    assert len(lines) == 1
    for tag in METRICS:
        assert f"{tag}: {straight.scalars[tag][STEPS]:.6E}" in lines[0]
    assert re.search(r"\| tokens/s: \d+ \| left: 0:00 \|$", lines[0])


def test_unlearning_unlearns(straight):
    for tag in ("forget loss", "forget token probability"):
        values = straight.series(tag)
        # Batches of untouched models differ by 2%.
        assert values[-1] < 0.9 * values[0]


def test_a_term_without_tokens_is_zero_and_not_nan(runs):
    run = runs["no forget tokens"]
    assert all(map(math.isfinite, all_values(run)))
    for suffix in ("", " validation"):
        assert set(run.series(f"forget loss{suffix}")) == {0.0}
        assert set(run.series(f"forget token probability{suffix}")) == {0.0}
        assert min(run.series(f"replay loss{suffix}")) > 1


def test_replay_terms_without_tokens_are_zero_and_not_nan(runs):
    run = runs["no replay tokens"]
    assert all(map(math.isfinite, all_values(run)))
    for suffix in ("", " validation"):
        assert set(run.series(f"replay loss{suffix}")) == {0.0}
        assert set(run.series(f"mitigation kl{suffix}")) == {0.0}
        assert set(run.series(f"replay perplexity{suffix}")) == {1.0}
        assert min(run.series(f"forget loss{suffix}")) > 0


def test_bf16_stays_near_fp32(runs):
    for tag in METRICS:
        for found, expected in zip(runs["bf16"].series(tag), runs["fp32"].series(tag), strict=True):
            # bf16 keeps 2 to 3 digits of a number; the KL is a small difference of two models. 0.4% was
            # seen, and 1.3% for the KL.
            assert found == pytest.approx(expected, rel=0.05 if "kl" in tag else 0.02), tag


def test_gradient_ascent_logs_its_negative_loss(runs):
    run = runs["gradient ascent"]
    forget = run.series("forget loss")
    assert max(forget) < 0
    assert forget[-1] < forget[0]
    # Megatron's console leaves averages below zero out; they follow on a line of their own.
    assert f"iteration        4 | forget loss: {forget[-1]:.6E} |" in run.output.replace(
        f" unlearn loss: {run.series('unlearn loss')[-1]:.6E} |", ""
    )
