"""The files that a report is made of, read and checked."""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_ext.analysis.loss_report import TAGS
from megatron_ext.analysis.report import Inputs
from megatron_ext.analysis.samples import parse_sets
from megatron_ext.analysis.scalars import Scalars, read_scalars
from megatron_ext.analysis.scores import Score, read_scores
from megatron_ext.analysis.verdict import Roles
from megatron_ext.exceptions import ConfigError, DataError


def read_inputs(options: Namespace) -> Inputs:
    """Read everything that the command line names.

    Args:
        options: ``tokens``, ``embeddings``, ``perplexity``, ``losses``, ``evaluation``, ``before``,
            ``after``, ``forgotten``, ``instruction``.

    Raises:
        ConfigError: nothing is named, or a role names a model or a set that no file has.
        DataError: a file is missing or of another form.
    """
    perplexity = options.perplexity and _read(options.perplexity, verb="perplexity")
    inputs = Inputs(
        tokens=[_read(path, verb="tokens") for path in options.tokens],
        embeddings=[_read(path, verb="embeddings") for path in options.embeddings],
        perplexity=perplexity,
        losses=_read_losses(options),
        scores=_read_evaluations(options.evaluation),
        roles=Roles(options.before, options.after, options.forgotten, options.instruction),
    )
    if not any((inputs.tokens, inputs.embeddings, inputs.perplexity, inputs.losses, inputs.scores)):
        raise ConfigError(
            "report: expected a file to report on (--tokens, --embeddings, --perplexity, --losses or "
            "--evaluation), found none"
        )
    _check_roles(inputs)
    return inputs


def _load(path: str) -> Any:
    try:
        return json.loads(Path(path).read_bytes())
    except FileNotFoundError as error:
        raise DataError(f"{path}: expected a JSON file, found nothing") from error
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: expected a JSON file, found {error}") from error


def _read(path: str, *, verb: str) -> dict[str, Any]:
    content = _load(path)
    found = content.get("verb", "another") if isinstance(content, dict) else "another"
    if found != verb:
        raise DataError(f"{path}: expected a file of `analyze.py {verb}`, found one of {found}")
    return content


def _read_losses(options: Namespace) -> dict[str, Scalars]:
    losses: dict[str, Scalars] = {}
    for name, path in parse_sets(options.losses, flag="--losses").items():
        scalars = read_scalars(Path(path))
        losses[name] = {tag: values for tag, values in scalars.items() if tag in TAGS}
        if not losses[name]:
            raise DataError(f"{path}: expected the losses of a run ({', '.join(TAGS)}), found none")
    return losses


def _read_evaluations(items: Sequence[str]) -> dict[str, dict[str, Score]]:
    """Scores by model; a model may have several files, one for each benchmark."""
    scores: dict[str, dict[str, Score]] = {}
    for item in items:
        ((name, path),) = parse_sets([item], flag="--evaluation").items()
        found = read_scores(_load(path), name=path)
        twice = sorted(scores.get(name, {}).keys() & found.keys())
        if twice:
            raise DataError(
                f"{path}: expected benchmarks without a score yet, found {twice[0]} again"
            )
        scores[name] = scores.get(name, {}) | found
    return scores


def _check_roles(inputs: Inputs) -> None:
    """A name that is misspelt would silently leave a finding out."""
    roles = inputs.roles
    if roles.after and roles.before is None:
        raise ConfigError("--after: expected --before beside it, found none")
    models, sets = set(inputs.scores), set()
    if inputs.perplexity is not None:
        models |= {model["label"] for model in inputs.perplexity["models"].values()}
        sets |= set(inputs.perplexity["data"])
    before = [] if roles.before is None else [roles.before]
    for flag, names, known in (
        ("--before", before, models),
        ("--after", roles.after, models),
        ("--forgotten", roles.forgotten, sets),
        ("--instruction", roles.instruction, sets),
    ):
        for name in names:
            if name not in known:
                raise ConfigError(
                    f"{flag}: expected one of {', '.join(sorted(known)) or 'no model or set'}, found {name}"
                )
