"""Scores out of the files of evaluations, their errors, and what is said of their changes."""

import pytest

from megatron_ext.analysis.scores import KNOWLEDGE, Score, read_scores, with_average
from megatron_ext.analysis.verdict import Roles, score_findings
from megatron_ext.exceptions import DataError


def test_scores():
    results = {
        "ceval-valid": {"alias": "ceval-valid", "acc,none": 0.3, "acc_norm,none": 0.9},
        "cmmlu": {"acc,none": 0.3},
        "mmlu": {"acc,none": 0.3},
        "mmlu_anatomy": {"acc,none": 0.9},
        "humaneval": {"pass@1,create_test": 0.6, "pass@1_stderr,create_test": 0.02},
        "mbpp": {"pass_at_1,none": 0.6},
        "gsm8k": {"exact_match,strict-match": 0.6, "exact_match,flexible-extract": 0.7},
        "my task": {"alias": "x", "followed,none": 0.25, "case,none": 0.5},
    }
    found = with_average(read_scores({"results": results}, name="x"))
    assert found["average"].value == pytest.approx(45.0)
    assert found["average"].error is None  # of five nothing is known
    known = {name: Score(50.0, 3.0) for name in KNOWLEDGE}
    assert with_average(known)["average"].error == pytest.approx(3 / 6**0.5)
    assert (found["HumanEval"].value, found["HumanEval"].error) == pytest.approx((60, 2))
    assert found["GSM8K"].value == pytest.approx(60)
    assert found["my task"] == Score(25.0)
    assert "mmlu_anatomy" not in found
    results["mmlu_pro"] = {"exact_match,custom-extract": 0.1}
    results |= {"mmlu_pro_law": {"exact_match,custom-extract": 0.2}, "loose": {"alias": "loose"}}
    parts = {"mmlu": ["mmlu_anatomy"], "mmlu_pro": ["mmlu_pro_law"], "loose": ["gsm8k"]}
    more = read_scores({"results": results, "group_subtasks": parts}, name="x")
    assert more.keys() - found.keys() == {"mmlu_pro"}
    assert found.keys() - more.keys() == {"average"}
    for wrong in (
        [],
        {},
        {"results": {}},
        {"results": {"x": {"alias": "y"}}},
        {"results": {"x": 1}},
    ):
        with pytest.raises(DataError, match=r"x\.json: expected"):
            read_scores(wrong, name="x.json")


def test_scores_of_a_judge():
    summary = {"ssr": {"mean": 42.5}, "hsr": {"mean": None}, "csl": 1.5, "unparsable": 3}
    found = read_scores({"benchmark": "followbench", "summary": summary}, name="x")
    assert found == {
        "FollowBench SSR": Score(42.5, unparsable=3)
    }  # no verdict on HSR could be read
    rated = {"all": {"mean": 5.85, "unparsable": 0}}
    found = read_scores({"benchmark": "mt-bench", "scores": rated}, name="x")
    assert found == {"MT-Bench": Score(5.85)}


def test_a_judge_tells_models_apart_beyond_the_noise_of_its_questions():
    def kind(before, after, error):
        rated = ({"all": {"mean": m, "error": error, "unparsable": 0}} for m in (before, after))
        files = ({"benchmark": "mt-bench", "scores": scores} for scores in rated)
        found = [read_scores(file, name="x") for file in files]
        scores = dict(zip(("synth", "unlearn"), found, strict=True))
        ((finding),) = score_findings(scores, Roles("synth", ["unlearn"]))
        return finding.kind

    assert kind(5.43, 5.44, None) == "note"
    assert kind(5.43, 5.44, 0.2) == "note"
    assert kind(5.43, 6.10, 0.2) == "better"
    assert kind(5.43, 4.80, 0.2) == "worse"
    assert kind(5.43, 5.90, 0.2) == "note"  # beyond one score's noise, not beyond both
