"""Standard errors of judged scores: by question and by example, not by answer."""

import math
from statistics import fmean, stdev

import numpy as np
import pytest

from megatron_ext.evaluation import followbench, harness, mtbench, paper
from megatron_ext.evaluation.errors import aligned, clustered_error, error_of_mean, with_error
from megatron_ext.evaluation.followbench_data import Question


def test_the_turns_of_a_question_are_one_observation():
    rng = np.random.default_rng(1)
    taste = rng.normal(6, 2, 80)
    ratings = [[float(t + d) for d in rng.normal(0, 0.3, 2)] for t in taste]
    questions = [mtbench.Question(n, "ab"[n % 2], ("?", "!")) for n in range(80)]
    found = [
        mtbench.Verdict(q, turn, ratings[q.id][turn])
        for q in reversed(questions)
        for turn in (0, 1)
    ]
    scores = mtbench.score(found)
    expected = stdev(map(fmean, ratings)) / math.sqrt(80)
    assert scores["all"]["error"] == pytest.approx(expected)
    of_answers = stdev(r for pair in ratings for r in pair) / math.sqrt(160)
    assert expected > 1.3 * of_answers  # what 160 independent answers would have
    assert scores["turns"]["1"]["error"] == pytest.approx(
        stdev(first for first, _ in ratings) / math.sqrt(80)
    )
    half = [fmean(pair) for pair in ratings[::2]]
    assert scores["categories"]["a"]["error"] == pytest.approx(stdev(half) / math.sqrt(40))


def test_what_cannot_be_parsed_and_single_questions():
    one, two = (mtbench.Question(n, "a", ("?", "!")) for n in (1, 2))
    found = [mtbench.Verdict(one, 0, 4.0), mtbench.Verdict(one, 1, None)]
    assert mtbench.score(found)["all"]["error"] is None
    found += [mtbench.Verdict(two, 0, 8.0), mtbench.Verdict(two, 1, 7.0)]
    assert mtbench.score(found)["all"]["error"] == pytest.approx((7.5 - 4) / 2)


def verdicts(satisfied):
    return [
        followbench.Verdict(Question("content", example, level, "", (), {}), count)
        for example, counts in enumerate(satisfied)
        for level, count in enumerate(counts, start=1)
    ]


def test_the_levels_of_an_example_are_one_observation():
    rng = np.random.default_rng(2)
    ends = rng.integers(0, 6, 30)  # the levels that an example satisfies in a row
    satisfied = [[level if level <= end else 0 for level in range(1, 6)] for end in ends]
    result = followbench.score(verdicts(satisfied))
    hard = [100 * fmean(level <= end for level in range(1, 6)) for end in ends]
    assert result["hsr"]["mean"] == pytest.approx(fmean(hard))
    assert result["hsr"]["error"] == pytest.approx(stdev(hard) / math.sqrt(30))
    assert result["ssr"]["error"] == pytest.approx(result["hsr"]["error"])
    assert result["csl_error"] == pytest.approx(stdev(map(float, ends)) / math.sqrt(30))
    both = followbench.summarise({"content": result, "style": result})
    for error, of_one in (
        (both["hsr"]["error"], result["hsr"]["error"]),
        (both["csl_error"], result["csl_error"]),
    ):
        assert error == pytest.approx(of_one / math.sqrt(2))


def test_the_error_is_the_spread_over_samples_of_examples():
    """Also where verdicts are missing, so that levels and questions have different numbers of them."""
    rng = np.random.default_rng(3)

    def draw():
        known = rng.random((40, 5)) < 0.95
        ends = rng.integers(0, 6, 40)
        return verdicts(
            [
                [
                    (level if level <= end else 0) if known[n, level - 1] else None
                    for level in range(1, 6)
                ]
                for n, end in enumerate(ends)
            ]
        )

    results = [followbench.score(draw()) for _ in range(60)]
    for value, error in (
        ([r["hsr"]["mean"] for r in results], [r["hsr"]["error"] for r in results]),
        ([r["csl"] for r in results], [r["csl_error"] for r in results]),
    ):
        assert fmean(error) == pytest.approx(stdev(value), rel=0.3)


def test_errors_of_means():
    assert error_of_mean([3.0, 4.0]) == 2.5
    assert error_of_mean([3.0, None]) is None
    assert error_of_mean([]) is None
    assert clustered_error([[1.0], [2.0]], lambda part: None) is None
    assert [with_error(v, e) for v, e in ((1, 0.5), (1, None), (None, None))] == [
        *("1.00 ± 0.50", "1.00", "-")
    ]


def test_values_and_errors_stand_below_one_another():
    assert aligned(["10.00 ± 1.50", "5.00", "", "6.00 ± 12.00"]) == [
        "10.00 ± 1.50 ",
        " 5.00        ",
        "             ",
        " 6.00 ± 12.00",
    ]
    assert aligned(["1.00", "22.00"]) == [" 1.00", "22.00"]


def test_the_harness_shows_the_errors_that_it_computes():
    results = {
        task: {metric: 0.5, metric.replace(",", "_stderr,"): 0.03, "alias": task}
        for task, metric in paper.BENCHMARKS.values()
    }
    results["mine"] = {"case,none": 0.25, "case_stderr,none": "N/A"}
    shown = harness.report("me", {"results": results, "settings": {"limit": None}})
    cells = ["50.00 ± 3.00"] * 6 + [f"50.00 ± {3 / math.sqrt(6):.2f}"]
    assert f"| {' | '.join(cells)} |" in shown
    assert "mmlu                     acc 0.5000 ± 0.0300" in shown
    assert "mine                     case 0.2500" in shown.splitlines()
    results["mmlu"]["acc_stderr,none"] = "N/A"
    shown = harness.report("me", {"results": results, "settings": {"limit": None}})
    (row,) = (line for line in shown.splitlines() if line.startswith("| me "))
    assert [cell.strip() for cell in row.split("|")][5::4] == ["50.00", "50.00"]
