"""What a user of the product can cause, as a small tree of exceptions.

A message names the flag or file, what was expected and what was found; the entry point and the tools
print it without a traceback.
"""

from __future__ import annotations

import traceback
from pathlib import Path


class MegatronExtError(Exception):
    """Base of everything that the product raises on purpose."""


class ConfigError(MegatronExtError):
    """A flag, or a combination of flags, that cannot work."""


class DataError(MegatronExtError):
    """Text, tokens or an index that is missing, broken or of another tokenizer."""


class CheckpointError(MegatronExtError):
    """A checkpoint that is missing, incomplete or of another model."""


class TrainingError(MegatronExtError):
    """A step whose result no run may go on with: NaN or inf in a loss or a gradient."""


def flag_name(argument: str) -> str:
    """The flag of an argument's name: ``--micro-batch-size`` of ``micro_batch_size``."""
    return f"--{argument.replace('_', '-')}"


def first_line(error: BaseException) -> str:
    """What an error says, in one line; its kind where it says nothing, as some of a GPU's driver do."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def refused_by_megatron(error: Exception) -> ConfigError:
    """What Megatron-Core says against the flags, or else the line that does: many assertions are bare."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    reason = str(error) or f"{frame.line} ({Path(frame.filename).name}, line {frame.lineno})"
    return ConfigError(f"refused by Megatron-Core: {reason}")
