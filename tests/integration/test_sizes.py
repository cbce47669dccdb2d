"""Other ways to give the sizes of a run, and half precision with a loss scale, all learn the same."""

import pytest

from tests.helpers.entry import METRICS, Launch
from tests.helpers.tiny import BATCH

STEPS = 3
SHORT = ("--lr", 1e-3, "--eval-iters", 2)
LAUNCHES = {
    "iterations": (*SHORT, "--train-iters", STEPS),
    "samples": (*SHORT, "--train-samples", STEPS * BATCH),
    # As many samples in half as many batches.
    "one large evaluation": (*SHORT, "--train-iters", STEPS, "--eval-iters", 1)
    + ("--eval-global-batch-size", 2 * BATCH, "--eval-micro-batch-size", 4),
    "fp16": (*SHORT, "--train-iters", STEPS, "--fp16", "--initial-loss-scale", 2**14),
    "fp16, overflow": (*SHORT, "--train-iters", STEPS, "--fp16", "--initial-loss-scale", 2**40)
    + ("--hysteresis", 1),
}


@pytest.fixture(scope="module")
def runs(tiny, server, runs_directory):
    launches = {name: Launch(tiny.unlearn(*flags)) for name, flags in LAUNCHES.items()}
    return server.run_all(launches, runs_directory / "sizes")


def of_training(run):
    return {tag: run.series(tag) for tag in (*METRICS, "grad-norm", "learning-rate")}


def of_validation(run):
    return {tag: run.series(f"{tag} validation") for tag in METRICS}


def test_samples_and_iterations_give_the_same_bits(runs):
    expected, found = runs["iterations"], runs["samples"]
    assert len(of_training(expected)["unlearn loss"]) == STEPS
    assert of_training(found) == of_training(expected)
    assert of_validation(found) == of_validation(expected)


def test_validation_does_not_depend_on_its_batch_size(runs):
    """A batch of validation has the proportions of training, so the same samples are read."""
    expected, found = runs["iterations"], runs["one large evaluation"]
    assert of_training(found) == of_training(expected)
    for tag, (value,) in of_validation(found).items():
        assert value == pytest.approx(of_validation(expected)[tag][0], rel=1e-6), tag


def test_fp16_is_fp32_but_for_rounding(runs):
    """fp16 keeps 5e-4 of a number; 8e-4 was seen. A scale left in would be off by 16384."""
    expected, found = runs["iterations"], runs["fp16"]
    for read in (of_training, of_validation):
        for tag, values in read(found).items():
            assert values == pytest.approx(read(expected)[tag], rel=5e-3), tag
    assert set(found.series("loss-scale")) == {2.0**14}


def test_fp16_leaves_out_steps_that_overflow(runs):
    """Megatron halves the scale and tries the next batch; the terms stay finite and are still logged."""
    run = runs["fp16, overflow"]
    assert run.series("loss-scale") == [2.0**39, 2.0**38, 2.0**37]
    first = {tag: values[0] for tag, values in of_training(runs["fp16"]).items()}
    assert all(run.series(tag)[0] == first[tag] for tag in METRICS)
    # No step was made, so there is no gradient norm.
    assert "grad-norm" not in run.scalars
