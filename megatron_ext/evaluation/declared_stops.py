"""Tokens that a released model's own files call its ends, beside the one of its tokenizer.

A tokenizer names one token, an instruction-tuned model ends with several: its answers with the end of a turn,
its documents still with that of pretraining, such as ``<|endoftext|>``.
"""

from __future__ import annotations

import json
from pathlib import Path

from megatron_ext.data.tokenizers import TokenizerSpec
from megatron_ext.exceptions import ConfigError

# The first that names any decides, as in `transformers`; they lie beside the tokenizer, imported or exported.
FILES = ("generation_config.json", "config.json")
KEY = "eos_token_id"


def declared_stops(tokenizer: TokenizerSpec) -> frozenset[int]:
    """Tokens that end a text by the files of the folder that the tokenizer is in.

    Args:
        tokenizer: one that is a file, or has a name on the hub, is in no such folder.

    Raises:
        ConfigError: a file is no JSON, or names something else than tokens.
    """
    for file in (Path(tokenizer.tokenizer_model) / name for name in FILES):
        if file.is_file() and (found := _read(file)):
            return found
    return frozenset()


def _read(file: Path) -> frozenset[int]:
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file}: expected the settings of a model, {error}") from error
    value = settings.get(KEY) if isinstance(settings, dict) else None
    tokens = value if isinstance(value, list) else [] if value is None else [value]
    if not all(type(token) is int for token in tokens):
        raise ConfigError(
            f"{file}: {KEY}: expected a token's id or a list of them, found {value!r}"
        )
    return frozenset(tokens)
