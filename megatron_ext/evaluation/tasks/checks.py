"""Scores of demo_instructions, called by the harness."""

from __future__ import annotations

from typing import Any

from megatron_ext.evaluation.rules import KINDS, follows


def process_results(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """Whether an answer follows all instructions of its request, and each kind of them.

    Args:
        doc: a request with its ``rules``, each a ``rule`` and an ``argument``.
        results: the answer.
    """
    answer = results[0]
    scores: dict[str, list[bool]] = {}
    for item in doc["rules"]:
        done = follows(item["rule"], item["argument"] or None, answer)
        scores.setdefault(KINDS[item["rule"]], []).append(done)
    every = all(all(done) for done in scores.values())
    return {"followed": float(every)} | {kind: float(all(done)) for kind, done in scores.items()}
