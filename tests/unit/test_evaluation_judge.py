"""The judge's endpoint, and what its words are taken for."""

import pytest

from megatron_ext.evaluation.followbench import Verdict, parse_verdict, score, summarise
from megatron_ext.evaluation.followbench_data import Question
from megatron_ext.evaluation.journal import Journal
from megatron_ext.evaluation.judge import Judge, Said, ask_all
from megatron_ext.evaluation.mtbench import parse_rating
from megatron_ext.exceptions import ConfigError, DataError
from tests.helpers.judge import stub_judge

MESSAGES = [{"role": "user", "content": "Is it good?"}]


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")


def judge(stub, **changes) -> Judge:
    return Judge(**{"url": stub.url, "model": "stub", "wait": 0.001, "attempts": 4} | changes)


def test_passing_failures_are_tried_again():
    with stub_judge(lambda messages: "fine") as stub:
        stub.failures = [503, 429, b"<html>"]
        assert judge(stub, api_key="secret").ask(MESSAGES) == Said("fine")
    assert len(stub.requests) == 4
    assert stub.keys == ["Bearer secret"] * 4
    body = stub.requests[-1]
    assert (body["model"], body["messages"], body["temperature"]) == ("stub", MESSAGES, 0)


def test_a_refused_request_ends_at_once_and_an_absent_judge_after_all_attempts():
    with stub_judge(lambda messages: "fine") as stub:
        stub.failures = [401]
        with pytest.raises(ConfigError, match="401"):
            judge(stub).ask(MESSAGES)
        assert len(stub.requests) == 1
        stub.failures = [500] * 9
        with pytest.raises(DataError, match="4 attempts, the last: 500"):
            judge(stub).ask(MESSAGES)
        assert len(stub.requests) == 5
    with pytest.raises(DataError, match="refused"):
        judge(stub, attempts=2).ask(MESSAGES)
    with pytest.raises(ConfigError, match="--judge-timeout: expected seconds above 0, found 0"):
        judge(stub, timeout=0)


def test_no_content_is_a_verdict_that_says_nothing():
    with stub_judge(lambda messages: None) as stub:
        assert judge(stub).ask(MESSAGES) == Said("")


def test_half_a_character_does_not_stop_a_run(tmp_path):
    """A verdict that was cut in the middle of a pair, as JSON can hold it and UTF-8 cannot."""
    with (
        stub_judge(lambda messages: "YES \ud83d\ude00 \ud83d") as stub,
        Journal(tmp_path / "j", settings={}) as journal,
    ):
        found = ask_all(judge(stub), {"1": MESSAGES}, journal=journal)
        assert found == {"1": Said("YES 😀 \ufffd")}


def test_finished_verdicts_are_kept_when_the_judge_goes_away(tmp_path):
    prompts = {str(n): [{"role": "user", "content": str(n)}] for n in range(6)}
    with stub_judge(lambda messages: "got " + messages[0]["content"]) as stub:
        one = judge(stub, parallel=1, attempts=1)
        with Journal(tmp_path / "j", settings={}) as journal:
            stub.failures = [b'{"choices": [{"message": {"content": "first"}}]}', 500]
            with pytest.raises(DataError, match="the same command goes on"):
                ask_all(one, prompts, journal=journal)
        with Journal(tmp_path / "j", settings={}) as journal:
            kept = len(journal)
            assert 1 <= kept < 6
            before = len(stub.requests)
            found = ask_all(one, prompts, journal=journal)
    assert len(stub.requests) - before == 6 - kept
    assert list(found) == list(prompts)
    assert found["0"] == Said("first")
    assert found["5"] == Said("got 5")


def test_what_a_limit_cut_is_asked_again_under_a_higher_one_and_nothing_else(tmp_path):
    """What was whole depends on no limit, so that one that is too high for the judge can be lowered."""
    prompts = {text: [{"role": "user", "content": text}] for text in ("short", "a long one", "old")}
    with (
        stub_judge(lambda messages: messages[0]["content"]) as stub,
        Journal(tmp_path / "j", settings={}) as journal,
    ):
        journal.add("old", "of an earlier version")
        for words, asked in ((2, ["short", "a long one"]), (2, []), (1, []), (3, ["a long one"])):
            stub.limit = words
            one = judge(stub, max_tokens=words, parallel=1)
            before = len(stub.requests)
            found = ask_all(one, prompts, journal=journal)
            assert [r["messages"][0]["content"] for r in stub.requests[before:]] == asked
            assert found["a long one"] == (Said("a long one") if words == 3 else Said("a long", 2))
            assert found["short"] == Said("short")
            assert found["old"] == Said("of an earlier version")
    assert Said("a long", 2).verdict == ""


def test_a_refused_request_names_its_question(tmp_path):
    with (
        stub_judge(lambda messages: "fine") as stub,
        Journal(tmp_path / "j", settings={}) as journal,
    ):
        stub.failures = [200, 400]
        prompts = {"81 1": MESSAGES, "81 2": MESSAGES}
        with pytest.raises(ConfigError, match=r"verdict of stub on question '81 2', found 400 "):
            ask_all(judge(stub, parallel=1), prompts, journal=journal)
        stub.failures = [503] * 9
        with pytest.raises(DataError, match=r"on question '81 \d', found none in 4 attempts"):
            ask_all(judge(stub, parallel=1), prompts, journal=journal)


def test_a_refusal_ends_the_attempts_of_all(tmp_path):
    """A wrong key, or Ctrl-C: what waits for its next attempt does not make it."""
    prompts = {"1": MESSAGES, "2": MESSAGES}
    with (
        stub_judge(lambda messages: "fine") as stub,
        Journal(tmp_path / "j", settings={}) as journal,
    ):
        stub.failures = [503, 401]
        with pytest.raises(ConfigError, match="401"):
            ask_all(judge(stub, wait=5.0, attempts=2, parallel=2), prompts, journal=journal)
        assert len(stub.requests) == 2


@pytest.mark.parametrize(
    ("level", "text", "expected"),
    [
        (1, "It does.\nYES", 1),
        (1, "['NO']", 0),
        (1, "perhaps", None),
        (1, "YES\nI cannot say more.", None),
        (1, "", None),
        (3, "Reasons.\n['YES', 'NO', 'YES']", 2),
        (3, '```\n["YES", "YES", "YES"]\n```', 3),
        (3, '```\n["YES", "NO", "YES"]\n```\n', 2),
        (3, "So: [YES, NO, PARTIAL]", 1),
        (3, "['YES', 'NO']", None),  # one is missing
        (3, "['YES', 'NO', 'WELL']", None),
        (3, "YES, NO, YES", None),
        (2, "[__import__('os').getcwd(), 'YES']", None),
        (2, "['YES'] + ['YES']", None),
    ],
)
def test_verdicts_on_constraints(level, text, expected):
    assert parse_verdict(text, level=level) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Rating: [[7]]", 7.0),
        ("[[8.5]] is what I give", 8.5),
        ("Rating: [3]", 3.0),
        ("see [2]; Rating: [[9]]", 9.0),
        ("Rating: 7", None),
        ("Rating: [[11]]", None),
        ("Rating: [[0]]", None),
        ("[[rating]]", None),
        ("", None),
    ],
)
def test_ratings(text, expected):
    assert parse_rating(text) == expected


def question(example: int, level: int) -> Question:
    return Question("content", example, level, "", (), {})


def test_scores_by_hand():
    """Two examples: satisfied constraints of each level, None where the judge was not understood."""
    satisfied = {1: [1, 2, 2, 4, 5], 2: [1, None, 3, 0, 1]}
    found = [
        Verdict(question(example, level), count)
        for example, counts in satisfied.items()
        for level, count in enumerate(counts, start=1)
    ]
    result = score(found)
    assert result["hsr"]["levels"] == [100, 100, 50, 50, 50]
    assert result["hsr"]["mean"] == pytest.approx(70)
    assert result["hsr"]["weighted"] == pytest.approx((1 * 100 + 2 * 100 + (3 + 4 + 5) * 50) / 15)
    assert result["hsr"]["bounds"] == pytest.approx([60, 70])
    two_thirds = 100 * (2 / 3 + 1) / 2
    assert result["ssr"]["levels"] == pytest.approx([100, 100, two_thirds, 50, 60])
    # The first holds levels 1 and 2; of the second it is not known whether it holds level 2, or level 3.
    assert result["csl"] == 2
    assert result["csl_bounds"] == [(2 + 1) / 2, (2 + 3) / 2]
    assert (result["unparsable"], result["verdicts"]) == (1, 10)
    perfect = score([Verdict(question(1, level), level) for level in range(1, 6)])
    assert (perfect["csl"], perfect["hsr"]["mean"], perfect["ssr"]["mean"]) == (5, 100, 100)
    both = summarise({"a": result, "b": perfect})
    assert both["hsr"]["mean"] == pytest.approx(85)
    assert both["hsr"]["bounds"] == pytest.approx([80, 85])
    assert (both["csl"], both["csl_bounds"]) == (3.5, [3.25, 3.75])
    assert both["hsr"]["error"] is None  # one example has none
    assert (both["unparsable"], both["verdicts"]) == (1, 15)


def test_levels_in_a_row_of_those_that_came_far_are_not_left_out():
    """Without the two whose rows meet an unparsable verdict the mean would be 1/2, less than it can be."""
    satisfied = {1: [0] * 5, 2: [1, None, 0, 0, 0], 3: [1, None, 0, 0, 0], 4: [1, 1, 0, 0, 0]}
    found = [
        Verdict(question(example, level), count)
        for example, counts in satisfied.items()
        for level, count in enumerate(counts, start=1)
    ]
    result = score(found)
    # 3 of 4 satisfy level 1, and of these the one that was understood does not satisfy level 2.
    assert result["csl"] == pytest.approx(3 / 4)
    assert result["csl_bounds"] == [(0 + 1 + 1 + 1) / 4, (0 + 2 + 2 + 1) / 4]
    unknown = score([v for v in found if v.question.example in (1, 2)])
    assert (unknown["csl"], unknown["csl_bounds"]) == (None, [0.5, 1.0])


def test_nothing_understood_is_no_score():
    result = score([Verdict(question(1, level), None) for level in range(1, 6)])
    assert result["hsr"] == {
        "levels": [None] * 5,
        "mean": None,
        "error": None,
        "weighted": None,
        "bounds": [0, 100],
    }
    assert (result["csl"], result["csl_bounds"]) == (None, [0, 5])
    assert result["unparsable"] == 5
