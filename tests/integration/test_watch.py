"""A run ends, as a success and with a checkpoint, after the step in which it reaches a limit."""

import pytest

from tests.helpers.entry import Launch
from tests.integration.conftest import STEPS, TRAIN

STOP = 4  # between two saves


@pytest.fixture(scope="module")
def limit(straight):
    """Of the probability; first met in step `STOP`."""
    values = straight.series("forget token probability")
    assert values[STOP - 1] < min(values[: STOP - 1])
    return (values[STOP - 1] + min(values[: STOP - 1])) / 2


@pytest.fixture(scope="module")
def flags(limit):
    """Three limits, of which one is reached."""
    far = ("--max-mitigation-kl", 5, "--max-replay-increase", 5)
    return (*TRAIN, *far, "--min-forget-probability", limit)


@pytest.fixture(scope="module")
def runs(tiny, server, flags, runs_directory):
    """Stopped over two pipeline stages, of which the second knows the metrics; and the reference's loss."""
    save = ("--save", runs_directory / "stopped")
    from_reference = tiny.objective("--load", tiny.reference, "--finetune", "--train-iters", 1)
    launches = {
        "stopped": Launch(
            tiny.unlearn(*flags, *save, "--pipeline-model-parallel-size", 2), ranks=2
        ),
        "from reference": Launch((*from_reference, "--lr-warmup-iters", 0)),
    }
    return server.run_all(launches, runs_directory / "watch")


def test_it_stops_with_a_checkpoint_and_says_why(runs, straight, limit, runs_directory):
    stopped = runs["stopped"]
    assert len(stopped.series("unlearn loss")) == STOP
    line = stopped.line(f"stopping after iteration {STOP}: forget token probability is ")
    assert line.endswith(f"and has reached --min-forget-probability {limit:.6g}")
    saved = runs_directory / "stopped"
    assert (saved / "latest_checkpointed_iteration.txt").read_text() == str(STOP)
    assert (saved / f"iter_{STOP:07d}").is_dir()
    # What it did until then is what a run without limits does.
    assert stopped.series("forget loss") == pytest.approx(
        straight.series("forget loss")[:STOP], rel=1e-5
    )


def test_tensorboard_shows_how_far_each_is(runs, limit):
    scalars = runs["stopped"]
    for metric, bound in (("mitigation kl", 5), ("replay increase", 5)):
        expected = [value / bound for value in scalars.series(metric)]
        assert scalars.series(f"watch/{metric}") == pytest.approx(expected, rel=1e-6)
    shares = scalars.series("watch/forget token probability")
    assert shares[-1] >= 1 > max(shares[:-1])
    expected = [limit / value for value in scalars.series("forget token probability")]
    assert shares == pytest.approx(expected, rel=1e-6)


def test_replay_is_compared_with_the_reference_on_the_same_tokens(runs):
    """The reference's loss is what a run that starts from it finds in its first step."""
    stopped, own = runs["stopped"], runs["from reference"]
    assert stopped.series("reference replay loss")[0] == pytest.approx(
        own.series("replay loss")[0], rel=1e-5
    )
    assert stopped.series("replay increase")[0] == pytest.approx(
        stopped.series("replay loss")[0] - own.series("replay loss")[0], abs=1e-5
    )


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_resume_says_at_once_that_nothing_is_left(
    runs, server, tiny, flags, runs_directory, ranks
):
    command = tiny.objective(*flags, "--load", runs_directory / "stopped")
    result = server.run(Launch(command, ranks), runs_directory / "watch" / f"again on {ranks}")
    assert result.returncode == 0
    reason = result.line("nothing left to train: ")
    assert f"at iteration {STOP} of {runs_directory / 'stopped'}" in reason
    assert "--min-forget-probability" in reason
    assert not result.scalars
    assert f"{STEPS:8d}/" not in result.output
