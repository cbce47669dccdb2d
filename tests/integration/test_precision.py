"""bf16 with the distributed optimizer: a checkpoint keeps the fp32 weights and moments of both ranks.

And fp16, whose first steps are skipped until its loss scale is low enough: a checkpoint from before that.
"""

import pytest

from tests.helpers.entry import METRICS, Launch
from tests.helpers.tiny import at_iteration

STEPS, HALF = 6, 3
FLAGS = (
    *("--bf16", "--use-distributed-optimizer", "--train-iters", STEPS, "--lr", 1e-3),
    *("--eval-interval", HALF, "--eval-iters", 1, "--save-interval", HALF),
)
# The first half of the steps overflows.
MANY, SKIPPED = 30, 15
SCALED = (
    *("--fp16", "--train-iters", MANY, "--lr", 1e-3, "--save-interval", SKIPPED, "--eval-iters", 0),
    *("--initial-loss-scale", 2**40, "--hysteresis", 1),
)
SHARED = {"of its own": (), "shared": ("--use-distributed-optimizer",)}
TAGS = (*METRICS, *(f"{tag} validation" for tag in METRICS), "grad-norm", "learning-rate")


@pytest.fixture(scope="module")
def runs(tiny, server, tmp_path_factory):
    """All steps at once; and the second half of them again, from what was saved before it."""
    directory = tmp_path_factory.mktemp("precision")
    whole = Launch(tiny.unlearn(*FLAGS, "--save", directory / "saved"), ranks=2)
    found = server.run_all({"whole": whole}, directory / "tensorboard")
    halfway = at_iteration(directory / "saved", HALF, directory / "halfway")
    rounded = tiny.unlearn(*FLAGS, "--grad-reduce-in-bf16")
    rest = Launch(tiny.objective(*FLAGS, "--load", halfway), ranks=2)
    later = {"rest": rest, "bf16 gradients": Launch(rounded, ranks=2)}
    return found | server.run_all(later, directory / "tensorboard")


@pytest.fixture(scope="module")
def scaled(tiny, server, tmp_path_factory):
    """The same in fp16, from before the first step that was not skipped, by kind of optimizer."""
    directory = tmp_path_factory.mktemp("fp16")
    first = {
        kind: Launch(tiny.plain(*SCALED, *more, "--save", directory / kind))
        for kind, more in SHARED.items()
    }
    found = {"whole": server.run_all(first, directory / "tensorboard")}
    rest = {}
    for kind, more in SHARED.items():
        halfway = at_iteration(directory / kind, SKIPPED, directory / f"{kind} halfway")
        rest[kind] = Launch(tiny.plain(*SCALED, *more, "--load", halfway))
    return found | {"rest": server.run_all(rest, directory / "tensorboard_rest")}


@pytest.mark.parametrize("kind", SHARED)
def test_fp16_is_resumed_from_before_its_first_step(scaled, kind):
    whole, rest = (scaled[part][kind].scalars for part in ("whole", "rest"))
    scales = list(whole["loss-scale"].values())
    assert scales[:SKIPPED] == [2.0 ** (39 - step) for step in range(SKIPPED)]
    assert scales[-1] == scales[-2]  # none is skipped in the end
    for tag in ("lm loss", "loss-scale"):
        expected = {step: value for step, value in whole[tag].items() if step > SKIPPED}
        assert rest[tag] == expected, tag


def test_a_resumed_run_has_the_bits_of_an_undisturbed_one(runs):
    whole, rest = runs["whole"].scalars, runs["rest"].scalars
    assert sorted(rest["unlearn loss"]) == list(range(HALF + 1, STEPS + 1))
    for tag in TAGS:
        assert rest[tag] == {step: value for step, value in whole[tag].items() if step > HALF}, tag


def test_the_model_learned_in_between(runs):
    """Or the comparison above would show nothing."""
    assert len(set(runs["whole"].series("forget loss validation"))) == STEPS // HALF
    assert runs["rest"].digest() == runs["whole"].digest()


def test_gradients_can_be_summed_in_bf16(runs):
    """With `--grad-reduce-in-bf16` the fused head, too, adds to sums of that type."""
    whole, rounded = runs["whole"].scalars, runs["bf16 gradients"].scalars
    assert rounded["grad-norm"] != whole["grad-norm"]
    for tag in (*METRICS, "grad-norm"):
        assert rounded[tag] == pytest.approx(whole[tag], rel=0.02, abs=1e-4), tag
