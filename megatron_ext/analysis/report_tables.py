"""Tables of a report: benchmarks beside the paper's, settings of runs, data and its hashes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from megatron_ext.analysis import html
from megatron_ext.analysis.scores import (
    AVERAGE,
    CHAT,
    KNOWLEDGE,
    Score,
    paper_scores,
    with_average,
)
from megatron_ext.evaluation.errors import with_error


def score_section(own: Mapping[str, Mapping[str, Score]]) -> str:
    """Benchmarks of a user's models, with the paper's below.

    Args:
        own: scores by model and benchmark.
    """
    if not own:
        return ""
    paper = paper_scores()
    known = (*KNOWLEDGE, *CHAT)
    others = dict.fromkeys(b for scores in own.values() for b in scores if b not in known)
    parts = []
    for title, benchmarks in (
        ("Knowledge and skills, percent", (*KNOWLEDGE, AVERAGE)),
        ("Following instructions, percent; MT-Bench 1 to 10", CHAT),
        ("Other tasks, percent where no other metric is named", tuple(others)),
    ):
        rows = [
            (name, *_cells(with_average(scores), benchmarks))
            for name, scores in own.items()
            if any(b in scores for b in benchmarks)
        ]
        if not rows:
            continue
        mine = len(rows)
        rows += [
            (f"paper: {name}", *_cells(scores, benchmarks))
            for name, scores in paper.items()
            if any(b in scores for b in benchmarks)
        ]
        parts += [
            html.heading(title),
            html.table(("model", *benchmarks), rows, other=range(mine, len(rows))),
        ]
    note = (
        "Rows in italics, “paper”, are the paper's own numbers (arXiv 2406.12397), of models with about 2 B "
        "parameters, trained on its data and scored by its tools. They are there to compare directions, not "
        "heights. ± is a standard error, where the evaluation gave one. Verdicts of a judge that could not "
        "be read are counted in brackets and are not in the score."
    )
    return html.section("Benchmarks", html.paragraph(note, soft=True), *parts)


def _cells(scores: Mapping[str, Score], benchmarks: Sequence[str]) -> list[str]:
    return [_cell(scores[name]) if name in scores else "-" for name in benchmarks]


def _cell(score: Score) -> str:
    unparsable = f" ({score.unparsable})" if score.unparsable else ""
    return with_error(score.value, score.error) + unparsable


def run_section(
    perplexity: Mapping[str, Any] | None,
    embeddings: Sequence[Mapping[str, Any]],
    tokens: Sequence[Mapping[str, Any]],
) -> str:
    """Settings and data of every model that was looked at, and the data it was looked at with.

    Args:
        perplexity: content of the file of ``perplexity``.
        embeddings: contents of the files of ``embeddings``.
        tokens: contents of the files of ``tokens``.
    """
    models = {} if perplexity is None else {m["label"]: m for m in perplexity["models"].values()}
    for report in embeddings:
        models.setdefault(report["model"]["label"], report["model"])
    measured: dict[str, Mapping[str, Any]] = {}
    for report in tokens:
        measured |= {name: entry["data"] for name, entry in report["sets"].items()}
    for report in embeddings:
        measured |= report["sets"]
    if perplexity is not None:
        measured |= perplexity["data"]
    if not measured:
        return ""
    parts = _settings(list(models.values())) if models else []
    rows = [(name, "", *_data_cells(entry)) for name, entry in measured.items()]
    parts += [html.heading("Data that was looked at"), html.table(_DATA_HEADER, rows, left=True)]
    note = (
        "From the arguments in each checkpoint, and the datasets as they were when it was measured. Hashes "
        "are SHA-256, of which the first 16 digits are shown. Data without a hash in their manifest have a "
        "sampled one, of their size and up to 64 blocks of 64 KiB."
    )
    return html.section("Runs and data", html.paragraph(note, soft=True), *parts)


def _settings(models: Sequence[Mapping[str, Any]]) -> list[str]:
    """Settings of each run, those that differ first, and its data."""
    names = dict.fromkeys(key for model in models for key in model["run"]["settings"])
    settings = [
        (name, *(_text(model["run"]["settings"].get(name)) for model in models)) for name in names
    ]
    head = [
        ("iteration", *(str(model["iteration"]) for model in models)),
        ("weights (digest)", *(model["digest"] for model in models)),
    ]
    differing = [row for row in settings if len(set(row[1:])) > 1]
    same = [(row[0], row[1]) for row in settings if len(set(row[1:])) == 1]
    header = ("setting", *(model["label"] for model in models))
    return [
        html.heading("Settings in which the runs differ"),
        html.table(header, head + differing, left=True),
        html.folded(
            "Settings that are the same", html.table(("setting", "value"), same, left=True)
        ),
        html.heading("Data of the runs"),
        html.table(_DATA_HEADER, _data_rows(models), left=True),
    ]


_DATA_HEADER = ("name", "flag", "prefix", "weight", "documents", "tokens", "data hash", "tokenizer")


def _data_rows(models: Sequence[Mapping[str, Any]]) -> list[tuple[str, ...]]:
    return [
        (model["label"], flag, *_data_cells(entry))
        for model in models
        for flag, entries in model["run"]["data"].items()
        for entry in entries
    ]


def _data_cells(entry: Mapping[str, Any]) -> tuple[str, ...]:
    weight = "" if entry.get("weight") is None else f"{entry['weight']:g}"
    if "missing" in entry:
        return (entry["prefix"], weight, "", "", f"not there any more: {entry['missing']}", "")
    tokenizer = entry["tokenizer_sha256"] or "unknown"
    whole = entry["content_sha256"]
    return (
        entry["prefix"],
        weight,
        f"{entry['documents']:,}",
        f"{entry['tokens']:,}",
        whole[:16] if whole else f"{entry['sampled_sha256'][:16]} (sampled)",
        tokenizer[:16],
    )


def _text(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_text(part)}" for key, part in value.items())
    if isinstance(value, list):
        return " ".join(map(str, value))
    return f"{value:g}" if isinstance(value, float) else str(value)
