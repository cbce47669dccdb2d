"""A checkpoint as tools name it: a directory as ``--load`` does, or one iteration, ``DIR/iter_NNNNNNN``."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from megatron_ext.checkpoint.complete import defect, held
from megatron_ext.checkpoint.inspect import (
    Checkpoint,
    folder_name,
    has_checkpoint,
    open_checkpoint,
)
from megatron_ext.exceptions import CheckpointError, ConfigError


def split_name(name: str | Path) -> tuple[Path, int | None]:
    """The checkpoint directory that is meant, and the iteration; ``None`` means the latest.

    A directory that has a tracker file of its own is meant itself, whatever it is called.
    """
    path = Path(name)
    found = re.fullmatch("iter_([0-9]+)", path.name)
    if found is None or has_checkpoint(path):
        return path, None
    return path.parent, int(found[1])


def open_named(
    name: str | Path,
    *,
    flag: str,
    iteration: int | None = None,
    iteration_flag: str = "--iteration",
) -> Checkpoint:
    """Read which checkpoint a tool is to take, without its tensors.

    An iteration that is named needs no tracker file.

    Args:
        name: what the flag names.
        flag: the flag, for messages.
        iteration: the iteration that another flag names, if the tool has one.
        iteration_flag: that flag, for messages.

    Raises:
        CheckpointError: there is no such checkpoint, or it is not complete; says which are.
        ConfigError: an iteration is named in both ways.
    """
    directory, named = split_name(name)
    if named is None:
        return open_checkpoint(
            directory, flag=flag, iteration=iteration, iteration_flag=iteration_flag
        )
    if iteration is not None:
        raise ConfigError(
            f"{iteration_flag}: expected none beside {flag} {name}, which names one, found {iteration}"
        )
    if directory.is_dir() and (reason := defect(directory / folder_name(named))):
        raise CheckpointError(
            f"{flag} {name}: expected a complete iteration of {directory} (complete: {held(directory)}), "
            f"found none: {reason}"
        )
    return open_checkpoint(directory, flag=flag, folder=folder_name(named))


def short_names(names: Sequence[str]) -> list[str]:
    """The shortest names that tell checkpoints apart: ends of paths, and iterations that were named.

    ``runs/base`` and ``runs/new/iter_0000002`` become ``base`` and ``new@2``; ``runs/base`` and ``old/base``
    stay as they are.
    """
    split = [split_name(name) for name in names]
    parts = [(path.resolve().parts, iteration) for path, iteration in split]
    found = list(names)
    for length in range(1, max((len(path) for path, _ in parts), default=0) + 1):
        found = [
            "/".join(path[-length:]) + ("" if iteration is None else f"@{iteration}")
            for path, iteration in parts
        ]
        if len(set(found)) == len(set(parts)):
            return found
    return list(names)
