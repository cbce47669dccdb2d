"""A resumed run goes on as if it had never stopped, at the same and at another layout."""

import pytest

from megatron_ext.analysis.scalars import compare
from megatron_ext.checkpoint.inspect import open_checkpoint
from megatron_ext.checkpoint.resumable import schedule_of
from megatron_ext.runtime.software import describe
from tests.helpers.entry import METRICS
from tests.integration.conftest import HALF, STEPS

TAGS = (*METRICS, "grad-norm", "learning-rate")


def second_half(run):
    return {
        tag: {step: value for step, value in run.scalars[tag].items() if step > HALF}
        for tag in (*TAGS, *(f"{tag} validation" for tag in METRICS))
    }


@pytest.mark.parametrize("run", ["same layout", "every key accounted for"])
def test_same_layout_gives_the_same_bits(straight, resumed, run):
    expected, found = second_half(straight), second_half(resumed[run])
    assert len(expected["unlearn loss"]) == STEPS - HALF
    assert found == expected


@pytest.mark.parametrize(
    "change",
    [
        *("DP 1 to DP 2", "DP 1 to CP 2", "TP 2 to PP 2"),
        "3 and 1 layers to 2 and 2",
        *("DP 2, overlapped, to CP 2", "DP 2, overlapped, to DP 1", "everything to one rank"),
    ],
)
def test_another_layout_gives_the_same_losses(straight, resumed, change):
    # Overlapped gradients lie in many buckets, each with padding at its end that no checkpoint has.
    expected, found = second_half(straight), second_half(resumed[change])
    for tag, difference in compare(expected, found, tags=list(expected)).items():
        assert difference < 1e-5, tag
    assert "another order" not in resumed[change].output


@pytest.mark.parametrize(
    "layout", ["TP 2", "DP 2, overlapped", "PP 2, 3 and 1 layers", "everything on 4 ranks"]
)
def test_another_layout_learns_the_same(straight, resumed, layout):
    # With overlapped gathers a head that reads its weight too early would use that of the step before.
    expected = {
        tag: {step: value for step, value in straight.scalars[tag].items() if step <= HALF}
        for tag in TAGS
    }
    for tag, difference in compare(expected, resumed[layout].scalars, tags=TAGS).items():
        assert difference < 1e-5, tag


def test_saves_are_asynchronous_where_that_is_asked_for(resumed):
    said = "scheduled an async checkpoint save"
    assert said in resumed["everything on 4 ranks"].output
    assert said not in resumed["TP 2"].output


def test_leaving_early_is_no_failure(resumed):
    run = resumed["TP 2"]
    assert max(run.scalars["unlearn loss"]) == HALF
    assert "Traceback" not in run.output


def test_the_recorded_reference_is_taken_and_not_the_student(straight, resumed):
    assert {run.digest() for run in resumed.values()} == {straight.digest()}


def test_the_schedule_that_is_compared_is_what_megatron_saves(straight, halfway):
    opened = open_checkpoint(halfway, flag="--load")
    assert {**opened.schedule, **schedule_of(opened.args)} == opened.schedule
    assert len(opened.schedule) == len(schedule_of(opened.args)) + 1  # and the steps done


def test_a_checkpoint_keeps_what_it_was_computed_by(straight, halfway):
    kept = open_checkpoint(halfway, flag="--load").args.software
    assert straight.line("software:") == describe(kept)


def test_the_log_holds_no_wall_of_remarks(straight):
    remarks = [
        line for line in straight.output.splitlines() if "Warning:" in line or "DEPREC" in line
    ]
    assert remarks == []
    # Of every line of the console, because the weights came from a later iteration than any of these.
    assert straight.output.count("Theoretical memory") == 2
    assert " PPL:" not in straight.output
