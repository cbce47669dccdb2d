"""One page of everything that was measured: figures, curves, scores, settings, and what it comes to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from megatron_ext.analysis import html
from megatron_ext.analysis.embedding_report import embedding_panels
from megatron_ext.analysis.figures import Panel, render
from megatron_ext.analysis.loss_report import TAGS, loss_panels, loss_rows
from megatron_ext.analysis.perplexity_report import perplexity_panels
from megatron_ext.analysis.report_tables import run_section, score_section
from megatron_ext.analysis.scalars import Scalars
from megatron_ext.analysis.scores import Score
from megatron_ext.analysis.token_report import structural_tokens, token_panels
from megatron_ext.analysis.verdict import (
    Finding,
    Roles,
    embedding_findings,
    score_findings,
    shift_findings,
    token_findings,
)

_TOKEN_ROWS = 15


@dataclass(frozen=True)
class Inputs:
    """What a report is made of; whatever is missing is left out of it.

    Attributes:
        tokens: contents of the files of ``tokens``.
        embeddings: contents of the files of ``embeddings``.
        perplexity: content of the file of ``perplexity``.
        losses: scalars by name of the run.
        scores: benchmark scores by name of the model.
        roles: what models and sets are to each other.
    """

    tokens: Sequence[Mapping[str, Any]] = ()
    embeddings: Sequence[Mapping[str, Any]] = ()
    perplexity: Mapping[str, Any] | None = None
    losses: Mapping[str, Scalars] = field(default_factory=dict)
    scores: Mapping[str, Mapping[str, Score]] = field(default_factory=dict)
    roles: Roles = field(default_factory=Roles)


def write_page(inputs: Inputs, *, title: str) -> str:
    """The report as one HTML document without references to anything outside of it."""
    parts = [
        _verdict(inputs),
        _tokens(inputs.tokens),
        _embeddings(inputs.embeddings),
        _perplexity(inputs.perplexity),
        _losses(inputs),
        score_section(inputs.scores),
        run_section(inputs.perplexity, inputs.embeddings, inputs.tokens),
    ]
    return html.page(title, [part for part in parts if part])


def _verdict(inputs: Inputs) -> str:
    """All findings; what got worse stands first, so that nobody has to look for it."""
    found: list[Finding] = []
    if inputs.perplexity is not None:
        found += shift_findings(inputs.perplexity, inputs.roles)
    found += score_findings(inputs.scores, inputs.roles)
    for report in inputs.tokens:
        found += token_findings(report)
    for report in inputs.embeddings:
        found += embedding_findings(report)
    worse = [(f.kind, f.label, f.text) for f in found if f.kind == "worse"]
    better = [(f.kind, f.label, f.text) for f in found if f.kind == "better"]
    notes = [(f.kind, f.label, f.text) for f in found if f.kind == "note"]
    roles = inputs.roles
    parts = []
    if roles.before is not None:
        parts.append(html.heading("What got worse"))
        nothing = "Nothing that was measured here got worse. What was not measured may have."
        parts.append(html.findings(worse) if worse else html.paragraph(nothing))
        if better:
            parts += [html.heading("What went as intended"), html.findings(better)]
        parts.append(html.heading("What else was measured"))
    parts.append(html.findings(notes) if notes else html.paragraph("Nothing else."))
    lead = (
        "Every sentence is computed from the numbers below. A change is claimed only where its 95% interval, "
        "in brackets, leaves no change out, and of a score only beyond its noise, 1.96 standard errors of "
        "the difference, and between scores made alike. Changes of perplexity are of the geometric mean over "
        "samples."
    )
    return html.section("What was measured", html.paragraph(lead, soft=True), *parts)


def _pictures(panels: Sequence[Panel], descriptions: Sequence[str]) -> str:
    pictures = [render([panel]) for panel in panels]
    return html.figures(map(html.figure, pictures, descriptions))


def _tokens(reports: Sequence[Mapping[str, Any]]) -> str:
    if not reports:
        return ""
    parts = []
    for report in reports:
        names = list(report["overuse"])
        texts = [
            text
            for name in names
            for text in (
                f"Kernel density over the token ids of {name} and {report['baseline']}; shaded: excess.",
                f"Tokens that {name} over-uses throughout its documents.",
            )
        ]
        parts.append(_pictures(token_panels(report), texts))
        for name in names:
            tokens = structural_tokens(report, name)
            if tokens:
                parts.append(html.heading(f"Structural tokens of {name}"))
                parts.append(_token_table(tokens, report["baseline"]))
    note = (
        "Figure 3 of the paper: synthetic text over-uses a few tokens that carry its format. Counted in "
        "sampled documents; the interval is a bootstrap over documents."
    )
    return html.section("Structural tokens", html.paragraph(note, soft=True), *parts)


def _token_table(tokens: Sequence[Mapping[str, Any]], baseline: str) -> str:
    header = (
        *("piece", "times as frequent", "95% interval", "count", f"count in {baseline}"),
        *("share of documents", f"in {baseline}"),
    )
    rows = [
        (
            token["piece"],
            f"{token['ratio']:,.1f}",
            f"{token['low']:,.1f} to {token['high']:,.1f}",
            f"{token['count']:,}",
            f"{token['baseline_count']:,}",
            f"{token['documents']:.1%}",
            f"{token['baseline_documents']:.1%}",
        )
        for token in tokens
    ]
    shown = html.table(header, rows[:_TOKEN_ROWS])
    if len(rows) > _TOKEN_ROWS:
        rest = html.table(header, rows[_TOKEN_ROWS:])
        shown += html.folded(f"{len(rows) - _TOKEN_ROWS} more", rest)
    return shown


def _embeddings(reports: Sequence[Mapping[str, Any]]) -> str:
    if not reports:
        return ""
    parts = []
    for report in reports:
        label = report["model"]["label"]
        text = (
            f"t-SNE of mean last hidden states under {label}. Only who is near whom has a meaning."
        )
        parts.append(_pictures(embedding_panels(report), [text]))
        rows = [
            (
                " | ".join(pair["sets"]),
                " | ".join(str(len(report["map"][name])) for name in pair["sets"]),
                f"{pair['accuracy']:.1%} ± {pair['accuracy_deviation']:.1%}",
                "50%",
                f"{pair['overlap']:.2f}",
            )
            for pair in report["pairs"]
        ]
        header = ("sets", "samples", "linear classifier", "chance", "neighbour overlap")
        parts.append(html.table(header, rows))
    note = (
        "Figure 2 of the paper: synthetic and real text lie in different regions. The classifier's accuracy "
        "is cross-validated in the full space and averaged over both sets (± deviation over folds); the "
        "overlap is 0 for sets apart and 1 for mixed ones."
    )
    return html.section("Embeddings", html.paragraph(note, soft=True), *parts)


def _perplexity(report: Mapping[str, Any] | None) -> str:
    if report is None:
        return ""
    models = list(report["models"].values())
    rows = []
    for name in models[0]["sets"]:
        for model in models:
            scores = model["sets"][name]
            loss = scores["summary"]["loss"]
            rows.append(
                (
                    f"{name}, {model['label']}",
                    f"{scores['corpus_perplexity']:,.4g}",
                    f"{loss['mean']:.3f}",
                    f"{loss['variance']:.3f}",
                    _interval(loss.get("shift"), "+.3f"),
                    _interval(loss.get("variance_ratio"), ".2f"),
                )
            )
    header = (
        *("set, model", "perplexity", "mean of log", "variance of log"),
        *(f"shift from {models[0]['label']}", "ratio of variances"),
    )
    texts = [
        f"Density of the log-perplexity of {len(scores['loss'])} samples of {name}."
        for name, scores in models[0]["sets"].items()
    ]
    note = (
        "Figure 4 of the paper: synthetic training lowers the mean and the variance of the perplexity of "
        "instruction data. Every model scores the same samples; intervals (95%) are a bootstrap over samples."
    )
    return html.section(
        "Perplexity",
        html.paragraph(note, soft=True),
        _pictures(perplexity_panels(report), texts),
        html.table(header, rows),
    )


def _interval(found: Mapping[str, float] | None, form: str) -> str:
    if found is None:
        return ""
    return f"{found['value']:{form}} ({found['low']:{form}} to {found['high']:{form}})"


def _losses(inputs: Inputs) -> str:
    panels = curves(inputs)
    if not panels:
        return ""
    tags = [tag for tag in TAGS if any(tag in scalars for scalars in inputs.losses.values())]
    header = ("run, loss", "steps", "first", "last")
    return html.section(
        "Loss curves",
        _pictures(panels, [f"{tag} by training step" for tag in tags]),
        html.table(header, loss_rows(inputs.losses)),
    )


def curves(inputs: Inputs) -> list[Panel]:
    """Loss curves, in which a model has the colour that it has in the other figures."""
    models = [] if inputs.perplexity is None else inputs.perplexity["models"].values()
    known = [model["label"] for model in models]
    names = [*known, *(name for name in inputs.losses if name not in known)]
    return loss_panels(inputs.losses, order={name: i for i, name in enumerate(names)})
