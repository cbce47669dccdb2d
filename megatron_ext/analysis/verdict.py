"""What was measured, in sentences: what shifted, what unlearning took back, and what got worse.

A sentence claims a change only if its 95% interval leaves no change out, and none of a score whose noise is
not known, or that was made under other conditions. It says nothing that was not measured, and nothing about
other data than the samples that were scored.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from megatron_ext.analysis.perplexity_report import compare
from megatron_ext.analysis.scores import Score
from megatron_ext.analysis.token_report import structural_tokens

# Accuracy of the classifier from which on sets are called apart, and up to which they are called mixed.
_APART, _MIXED = 0.9, 0.6
# Characters of a setting that a sentence shows.
_SHOWN = 60


@dataclass(frozen=True)
class Finding:
    """A sentence.

    Attributes:
        kind: ``better``, ``worse`` or ``note``.
        label: what it is about, in a word or two.
        text: the sentence.
    """

    kind: str
    label: str
    text: str


@dataclass(frozen=True)
class Roles:
    """What the models and sets are to each other.

    Attributes:
        before: the model before unlearning; ``None`` if nothing was unlearned.
        after: the models after it.
        forgotten: sets that were to be forgotten, so that losing them is no damage.
        instruction: sets whose shift by synthetic training was to be taken back.
    """

    before: str | None = None
    after: Sequence[str] = field(default_factory=tuple)
    forgotten: Sequence[str] = field(default_factory=tuple)
    instruction: Sequence[str] = field(default_factory=tuple)


def token_findings(report: Mapping[str, Any]) -> list[Finding]:
    """Which sets over-use structural tokens."""
    found = []
    for name, overuse in report["overuse"].items():
        tokens = structural_tokens(report, name)
        if not tokens:
            text = f"{name} over-uses no structural token against {report['baseline']}."
        else:
            named = ", ".join(
                f"“{token['piece']}” ({token['ratio']:,.0f} times)" for token in tokens[:5]
            )
            own, other = overuse["structural_share"], overuse["baseline_structural_share"]
            text = (
                f"{len(tokens)} structural tokens make {own:.1%} of {name} and {other:.1%} of "
                f"{report['baseline']}. Most over-used: {named}."
            )
        found.append(Finding("note", "tokens", text))
    return found


def embedding_findings(report: Mapping[str, Any]) -> list[Finding]:
    """Whether the model tells sets apart."""
    found = []
    for pair in report["pairs"]:
        first, second = pair["sets"]
        accuracy = pair["accuracy"]
        words = "are clearly told apart"
        if accuracy < _APART:
            words = "are partly told apart" if accuracy > _MIXED else "are hardly told apart"
        text = (
            f"{first} and {second} {words} by {report['model']['label']}'s embeddings: a linear classifier "
            f"puts {accuracy:.0%} of unseen samples right (chance: 50%), and neighbourhoods overlap by "
            f"{pair['overlap']:.0%}."
        )
        found.append(Finding("note", "embeddings", text))
    return found


def shift_findings(report: Mapping[str, Any], roles: Roles) -> list[Finding]:
    """How perplexities moved: by the training before unlearning, and by unlearning."""
    models = {model["label"]: model["sets"] for model in report["models"].values()}
    base = next(iter(models))
    sets = list(models[base])
    before = roles.before
    if before is None or before not in models:
        return [
            _from_base(base, label, name, scores[name]["summary"]["loss"])
            for label, scores in models.items()
            if label != base
            for name in sets
        ]
    found = []
    if before != base:
        found += [
            _from_base(base, before, name, models[before][name]["summary"]["loss"]) for name in sets
        ]
    for after in roles.after:
        if after in models:
            found += [_from_before(name, (base, before, after), models, roles) for name in sets]
    return found


def _from_base(base: str, label: str, name: str, summary: Mapping[str, Any]) -> Finding:
    shift, ratio = summary["shift"], summary.get("variance_ratio")
    text = f"{label} against {base}, {name}: {_moved(shift)}"
    if ratio is not None:
        width = "does not change measurably"
        if ratio["high"] < 1 or ratio["low"] > 1:
            width = f"is {'smaller' if ratio['value'] < 1 else 'larger'}"
        text += (
            f"; the variance of log-perplexity {width} ({ratio['value']:.2f} times, {ratio['low']:.2f} to "
            f"{ratio['high']:.2f})"
        )
    return Finding("note", "shift", f"{text}.")


def _from_before(
    name: str, labels: tuple[str, str, str], models: Mapping[str, Any], roles: Roles
) -> Finding:
    """One set, before and after unlearning; what counts as good depends on what the set is for."""
    base, before, after = (np.array(models[label][name]["loss"]) for label in labels)
    shift = compare(after, before)["shift"]
    text = f"{labels[2]} against {labels[1]}, {name}: {_moved(shift)}"
    rose, fell = shift["low"] > 0, shift["high"] < 0
    if name in roles.forgotten:
        kind = "better" if rose else "worse"
        return Finding(kind, "forgotten" if rose else "not forgotten", f"{text}.")
    if name in roles.instruction and labels[0] != labels[1]:
        caused, left = before.mean() - base.mean(), after.mean() - base.mean()
        text += f". Synthetic training had moved it by {_percent(caused)}; {_percent(left)} is left"
        if not (rose or fell):
            return Finding("note", "no change", f"{text}.")
        back = abs(left) < abs(caused)
        return Finding(
            "better" if back else "worse", "moved back" if back else "moved away", f"{text}."
        )
    if rose:
        return Finding("worse", "got worse", f"{text}.")
    return Finding("better" if fell else "note", "got better" if fell else "no change", f"{text}.")


def _moved(shift: Mapping[str, float]) -> str:
    """A shift of the mean log-perplexity, as a change of the perplexity."""
    ends = f"{_percent(shift['low'])} to {_percent(shift['high'])}"
    if shift["low"] <= 0 <= shift["high"]:
        return f"no measurable change of perplexity ({_percent(shift['value'])}, {ends})"
    direction = "rises" if shift["value"] > 0 else "falls"
    return f"perplexity {direction} by {_percent(shift['value']).lstrip('+-')} ({ends})"


def _percent(nats: float) -> str:
    """A change of log-perplexity as one of the perplexity: in percent, above 1,000% as a multiple."""
    factor = math.exp(min(nats, 300.0))
    return f"{factor - 1:+.1%}" if factor < 11 else f"+{factor:,.3g} times"


def score_findings(scores: Mapping[str, Mapping[str, Score]], roles: Roles) -> list[Finding]:
    """Which benchmarks rose or fell from the model before to each model after.

    The noise of a change is ``1.96 sqrt(error_before^2 + error_after^2)``, as of independent scores: too much
    rather than too little, as both models answer the same questions.
    """
    before = scores.get(roles.before or "", {})
    found = []
    for after in roles.after:
        for benchmark, score in scores.get(after, {}).items():
            if benchmark in before:
                found.append(_score_finding(benchmark, before[benchmark], score, after))
    return found


def _score_finding(benchmark: str, before: Score, after: Score, name: str) -> Finding:
    change = after.value - before.value
    text = (
        f"{name}, {benchmark}: {before.value:.2f} before, {after.value:.2f} after ({change:+.2f})"
    )
    unread = before.unparsable + after.unparsable
    if unread:
        text += f", without {unread} verdicts of the judge that could not be read"
    if others := _differences(before.conditions, after.conditions):
        unlike = f"made under other conditions, so the change is not the model's alone: {others}"
        return Finding("note", "not comparable", f"{text}; {unlike}.")
    if before.error is None or after.error is None:
        unknown = "the noise of this score is not known, so neither is what the change says"
        return Finding("note", "noise not known", f"{text}; {unknown}.")
    half = 1.96 * math.hypot(before.error, after.error)
    if abs(change) <= half:
        return Finding("note", "no change", f"{text}, within the noise of ±{half:.2f}.")
    text += f", beyond the noise of ±{half:.2f}"
    higher = after.higher_is_better
    if higher is None or before.higher_is_better is not higher:
        return Finding("note", "changed", f"{text}; whether more of it is better is not known.")
    kind = "better" if (change > 0) == higher else "worse"
    return Finding(kind, f"got {kind}", f"{text}{'' if higher else '; less of it is better'}.")


def _differences(before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    """What two scores were not made alike in; empty if they were, as far as their files say."""
    names = dict.fromkeys((*before, *after))
    unlike = [name for name in names if before.get(name) != after.get(name)]
    return "; ".join(
        f"{name} {_setting(before.get(name))} before, {_setting(after.get(name))} after"
        for name in unlike
    )


def _setting(value: Any) -> str:
    """A value of a flag; of a digest or a list no more than tells it from others at a glance."""
    if value is None or value is True:
        return "given" if value else "not given"
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 1]}…"
