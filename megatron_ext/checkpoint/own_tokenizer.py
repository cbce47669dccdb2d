"""The tokenizer that a model brings: of a Hugging Face folder, or recorded with a checkpoint.

Nothing of `transformers` is imported here: with its models it takes seconds of a start.
"""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_ext.data.tokenizers import TokenizerSpec
from megatron_ext.exceptions import ConfigError

if TYPE_CHECKING:
    from megatron_ext.checkpoint.inspect import Checkpoint

KEPT = "huggingface"  # folder of a checkpoint: what an imported model brought besides its weights
TOKENIZER_TYPE = "HuggingFaceTokenizer"
CONFIG = "config.json"  # that every Hugging Face model has


def tokenizer_spec(folder: Path) -> TokenizerSpec:
    """The tokenizer of a folder, in Megatron's terms."""
    return TokenizerSpec(tokenizer_type=TOKENIZER_TYPE, tokenizer_model=str(folder))


def choose_tokenizer(options: Namespace, checkpoint: Checkpoint) -> tuple[str, str]:
    """Type and model of the command line's tokenizer, or else of the one recorded with a checkpoint.

    Args:
        options: ``tokenizer_type`` and ``tokenizer_model``, each ``None`` where it was not given.
        checkpoint: an opened checkpoint.

    Raises:
        ConfigError: neither names a tokenizer.
    """
    saved, kept = checkpoint.args, checkpoint.directory / KEPT
    kind = getattr(saved, "tokenizer_type", None) or TOKENIZER_TYPE
    model = getattr(saved, "tokenizer_model", None)
    if kept.is_dir():
        kind, model = TOKENIZER_TYPE, str(kept)
    model = options.tokenizer_model or model
    if model is None:
        raise ConfigError(f"--tokenizer-model: expected a tokenizer, {checkpoint.path} names none")
    return options.tokenizer_type or kind, str(model)
