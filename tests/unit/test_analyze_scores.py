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


def change(before, after):
    """What is said of two files of one benchmark."""
    found = [read_scores(file, name="x") for file in (before, after)]
    ((finding),) = score_findings(
        dict(zip(("synth", "unlearn"), found, strict=True)), Roles("synth", ["unlearn"])
    )
    return finding


def task(metrics, **file):
    return {"results": {"x": metrics | {"alias": "x"}}} | file


@pytest.mark.parametrize(
    ("told", "kinds"),
    [(True, ("better", "worse")), (False, ("worse", "better")), (None, ("note", "note"))],
)
def test_what_is_better_is_as_the_harness_says(told, kinds):
    told = {"higher_is_better": {"x": {"likelihood_diff": told}}}
    low, high = (
        task({"likelihood_diff,none": value, "likelihood_diff_stderr,none": 0.1}, **told)
        for value in (3.0, 5.0)
    )
    up, down = change(low, high), change(high, low)
    assert (up.kind, down.kind) == kinds
    assert "x (likelihood_diff): 3.00 before, 5.00 after (+2.00)" in up.text
    assert up.text.endswith("less of it is better.") == (kinds[0] == "worse")
    if kinds[0] == "note":
        assert (up.label, down.label) == ("changed", "changed")
        assert "whether more of it is better is not known" in up.text


def test_only_rates_are_percent():
    score = read_scores(task({"word_perplexity,none": 12.3, "byte_perplexity,none": 1.7}), name="x")
    assert score == {"x (word_perplexity)": Score(12.3, higher_is_better=None)}
    for metric in ("acc", "acc_norm", "exact_match", "pass@10", "prompt_level_loose_acc"):
        assert read_scores(task({f"{metric},none": 0.25}), name="x") == {"x": Score(25.0)}


def rated(mean, **file):
    score = {"mean": mean, "error": 0.1, "unparsable": 0}
    return {"benchmark": "mt-bench", "scores": {"all": score}} | file


ANSWERS = {"model": "a", "model_path": "p", "tokenizer_model": "t", "chat_template": "c", "seed": 1}
ANSWERS |= {"max_new_tokens": 1024, "temperature": {"maths": 0.0}, "questions": "1f" * 32}


@pytest.mark.parametrize(
    ("before", "after", "unlike"),
    [
        ({"judge": {"model": "J"}}, {"judge": {"model": "K"}}, "--judge-model J before, K after"),
        ({"language": "en"}, {"language": "zh"}, "--language en before, zh after"),
        (
            {"answers": ANSWERS},
            {"answers": ANSWERS | {"max_new_tokens": 64}},
            "--max-new-tokens 1024 before, 64 after",
        ),
        (
            {"constraint_types": {"style": {}}},
            {"constraint_types": {"style": {}, "format": {}}},
            '--constraint-types ["style"] before, ["format", "style"] after',
        ),
    ],
)
def test_verdicts_made_under_other_conditions_are_not_compared(before, after, unlike):
    finding = change(rated(4.0, **before), rated(6.0, **after))
    assert (finding.kind, finding.label) == ("note", "not comparable")
    assert finding.text.endswith(f"the change is not the model's alone: {unlike}.")
    assert change(rated(4.0, **before), rated(6.0, **before)).kind == "better"


def test_another_model_is_no_other_condition():
    others = dict.fromkeys(("model", "model_path", "tokenizer_model", "chat_template"), 2)
    own = ANSWERS | others | {"seed": 2}
    assert change(rated(4.0, answers=ANSWERS), rated(6.0, answers=own)).kind == "better"


@pytest.mark.parametrize(
    ("unlike", "text"),
    [
        ({"settings": {"limit": 100}}, "--limit not given before, 100 after"),
        ({"settings": {"num_fewshot": 0}}, "--num-fewshot not given before, 0 after"),
        ({"n-shot": {"x": 5}}, "--num-fewshot not given before, 5 after"),
        ({"n-shot": {"a": 5, "b": 4}}, "--num-fewshot not given before, [4, 5] after"),
        (
            {"settings": {"apply_chat_template": True}},
            "--apply-chat-template not given before, given",
        ),
        ({"versions": {"x": 2}}, "version of the task not given before, 2 after"),
    ],
)
def test_tasks_asked_in_another_way_are_not_compared(unlike, text):
    settings = {"limit": None, "num_fewshot": None, "apply_chat_template": False, "seed": 1}
    groups = {"group_subtasks": {"x": ["part"], "part": ["a", "b"]}}
    low, high = ({"acc,none": value, "acc_stderr,none": 0.01} for value in (0.2, 0.6))
    finding = change(task(low, settings=settings, **groups), task(high, **groups | unlike))
    assert (finding.kind, finding.label) == ("note", "not comparable")
    assert text in finding.text
    alike = [
        task(metrics, settings=settings | {"seed": n}) for n, metrics in enumerate((low, high))
    ]
    assert change(*alike).kind == "better"
