"""A folder that appears under its final name complete, or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_ext.data.atomic import fsync, taken
from megatron_ext.exceptions import ConfigError


@contextmanager
def new_folder(path: Path, *, mark: str, overwrite: bool = False) -> Iterator[Path]:
    """Fill a folder beside its destination, then rename it.

    Args:
        path: the destination. An empty folder may be there.
        mark: a file that every folder of this kind holds; only such a folder is replaced, so that a
            mistyped name costs nobody a home directory.
        overwrite: whether a folder that is there may be replaced.

    Yields:
        The folder to fill.

    Raises:
        ConfigError: something is at the destination.
    """
    path = path.resolve()
    partial, old = (path.with_name(f"{path.name}.{kind}-{os.getpid()}") for kind in ("new", "old"))
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        if not overwrite:
            raise taken(path)
        if not (path / mark).is_file():
            raise ConfigError(
                f"--overwrite: expected {mark} in {path}, found none; it is not replaced"
            )
    path.parent.mkdir(parents=True, exist_ok=True)
    partial.mkdir()
    try:
        yield partial
        _flush(partial)
        if path.exists():
            path.rename(old)
        partial.rename(path)
        fsync(path.parent)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        if old.exists() and not path.exists():
            old.rename(path)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _flush(folder: Path) -> None:
    """Everything reaches the disk before the name does."""
    for entry in [*folder.rglob("*"), folder]:
        fsync(entry)
