"""What answers were made with, kept beside them, so that no other model's are scored as a model's own.

``NAME.settings.json`` beside ``NAME.jsonl``: flags with their values, of weights, tokenizer and questions a
digest, and the digest of the answers themselves: a file that was put in their place has no settings. The
answers keep the form that the projects read, and stand for themselves where no model is named: they may
come from anywhere and only be judged here.
"""

from __future__ import annotations

import hashlib
import json
import logging
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_ext.data.atomic import AtomicFiles
from megatron_ext.evaluation.completion import Codec, Generator
from megatron_ext.evaluation.records import Record, json_lines
from megatron_ext.exceptions import ConfigError, flag_name

logger = logging.getLogger(__name__)

Settings = dict[str, Any]

# Further tokens that end an answer; no flag's, but a file's of the model.
STOPS = "eos_token_id"
# Said of a file of answers, and not what they depend on.
_DIGEST, _PATH = "answers_sha256", "model_path"
# Characters of a value that a message shows.
_SHOWN = 40


def settings_file(answers: Path) -> Path:
    """Where the settings of a file of answers are; the projects read ``*.jsonl`` only."""
    return answers.with_suffix(".settings.json")


def digest(value: Any) -> str:
    """SHA-256 of what JSON can hold."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def model_settings(generator: Generator, codec: Codec) -> Settings:
    """Settings that only a model that was loaded tells, by flag.

    Tokenizer and template tell the tokens that end an answer. Those that the model's files declare are told
    only where there are others: answers of models without any stay what they were.
    """
    found: Settings = {
        "model": generator.identity,
        "tokenizer_model": codec.digest,
        "chat_template": codec.template.source,
    }
    more = codec.declared - {codec.eod, codec.template.end_of_turn}
    return found | ({STOPS: sorted(more)} if more else {})


def write_answers(
    file: Path, records: Sequence[Record], settings: Settings, options: Namespace
) -> None:
    """Write answers and what they were made with, both or neither.

    Args:
        file: the answers, which are replaced.
        records: its lines.
        settings: by flag.
        options: ``model``, whose path is told as well, and compared with nothing.
    """
    lines = json_lines(records)
    beside = {_PATH: str(options.model), **settings, _DIGEST: hashlib.sha256(lines).hexdigest()}
    place = settings_file(file)
    with AtomicFiles([place, file], overwrite=True) as files:
        files[place].write(json.dumps(beside, indent=1, ensure_ascii=False).encode())
        files[file].write(lines)
        files.commit()


def read_settings(file: Path) -> Settings | None:
    """What answers were made with; ``None`` if nothing says so, or it is said of other answers."""
    try:
        found = json.loads(settings_file(file).read_bytes())
    except (OSError, ValueError):
        return None
    if not isinstance(found, dict):
        return None
    known = found.pop(_DIGEST, None) == hashlib.sha256(file.read_bytes()).hexdigest()
    return found if known else None


def check_reused(file: Path, wanted: Settings) -> None:
    """Refuse to take a file of answers for those of this run.

    Args:
        file: answers that are there.
        wanted: settings of this run, by flag: all of them, or those that are known before a model is loaded.

    Raises:
        ConfigError: they were made with others, or it is not known with which; names the file and the flags.
    """
    ways = "--overwrite answers again; without --model they are judged as they are"
    found = read_settings(file)
    if found is None:
        place = settings_file(file)
        raise ConfigError(
            f"{file}: expected answers of --model with the settings of this run, found answers of which "
            f"model, template, tokenizer, questions and sampling are not known ({place} "
            f"{'is about other answers' if place.exists() else 'is not there'}); {ways}"
        )
    others = [
        f"{_flag(key)}: expected {_shown(value)}, found {_shown(found.get(key))}"
        for key, value in wanted.items()
        if found.get(key) != value
    ]
    if others:
        raise ConfigError(
            f"{file}: expected answers with the settings of this run, found answers of "
            f"{found.get(_PATH)} with others ({'; '.join(others)}); {ways}"
        )


def common_settings(files: Sequence[Path], *, questions: str) -> Settings | None:
    """What all answers that are scored together were made with, for the summary of the scores.

    Args:
        files: answers that are there.
        questions: the flag whose digest differs from file to file.

    Returns:
        The settings, without those of the questions if there are several files; ``None`` if they are not
        known of each file.

    Raises:
        ConfigError: two files were made with different ones; names them and what differs.
    """
    known = []
    for file in files:
        settings = read_settings(file)
        if settings is None:
            logger.info("%s: what made these answers is not known", file)
            continue
        if len(files) > 1:
            settings.pop(questions, None)
        known.append((file, settings))
    for file, settings in known[1:]:
        before, first = known[0]
        others = [key for key in first if key != _PATH and settings.get(key) != first[key]]
        if others:
            raise ConfigError(
                f"{file}: expected answers with the settings of {before}, to be scored together, found "
                f"others of {', '.join(map(_flag, others))}; --model with --overwrite answers again"
            )
    return known[0][1] if known and len(known) == len(files) else None


def _flag(key: str) -> str:
    return key if key == STOPS else flag_name(key)


def _shown(value: Any) -> str:
    """A value, or what tells it from others if it is long."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    if len(text) <= _SHOWN:
        return text
    if len(text) == 2 * hashlib.sha256().digest_size and text.isalnum():
        return f"{text[:12]}…"
    return f"a text of {len(text)} characters, SHA-256 {hashlib.sha256(text.encode()).hexdigest()[:12]}…"
