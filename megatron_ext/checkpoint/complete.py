"""Whether a checkpoint was written to its end.

A save writes the tensors' files, then ``.metadata``, which lists each stored item with its file, offset
and length, then ``metadata.json``, and at last the tracker file. A killed run or a full disk leaves the
first of these behind; a copy that broke off leaves files too short.
"""

from __future__ import annotations

import contextlib
import os
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CONFIG_FNAME

from megatron_ext.checkpoint import safe_load

# Without any one of these a folder is no checkpoint; removed before a folder is written again.
MARKS = (CONFIG_FNAME, ".metadata")
# Iterations that a message lists.
_MOST_NAMED = 5
# What was found, by the folder, while that counts.
_found: dict[Path, str | None] | None = None


@contextlib.contextmanager
def looked_at_once() -> Iterator[None]:
    """Let what was found of a checkpoint count until the end of this: a start asks up to three times.

    Nothing is written meanwhile. Later saves are looked at anew.
    """
    global _found
    _found = {}
    try:
        yield
    finally:
        _found = None


def defect(path: Path) -> str | None:
    """Why a torch_dist checkpoint cannot be complete, without reading its tensors; ``None`` if it is.

    Args:
        path: folder of the iteration.
    """
    if _found is None:
        return _look_for_defect(path)
    folder = path.resolve()  # one checkpoint may have several names
    if folder not in _found:
        _found[folder] = _look_for_defect(path)
    return _found[folder]


def _look_for_defect(path: Path) -> str | None:
    if not path.is_dir():
        return "there is no such folder"
    try:
        if not dist_checkpointing.check_is_distributed_checkpoint(str(path)):
            return f"{CONFIG_FNAME} is missing or of another format"
    except Exception as error:  # Megatron's reader lets JSON's pass
        return f"{CONFIG_FNAME} cannot be read: {safe_load.reason(error)}"
    try:
        with (path / ".metadata").open("rb") as stream:
            metadata = safe_load.load_metadata(stream)
        ends: dict[str, int] = defaultdict(int)
        for item in metadata.storage_data.values():
            name = item.relative_path
            ends[name] = max(ends[name], item.offset + item.length)
    except FileNotFoundError:
        return ".metadata is missing"
    except Exception as error:  # a truncated pickle may raise anything
        return f".metadata cannot be read: {safe_load.reason(error)}"
    # A listing over NFS brings the sizes along; asked for one by one, each is a request.
    with os.scandir(path) as listing:
        files = {entry.name: entry for entry in listing}
    for name, expected in sorted(ends.items()):
        try:
            found = (files.get(name) or path / name).stat().st_size
        except FileNotFoundError:
            return f"{name} is missing"
        if found < expected:
            return f"{name} has {found} of {expected} bytes"
    return None


def held(directory: Path) -> str:
    """The last complete iterations of a checkpoint directory, in words, and how many others there may be.

    Args:
        directory: what ``--load`` names.
    """
    names = (
        file.parent.name.removeprefix("iter_") for file in directory.glob(f"iter_*/{CONFIG_FNAME}")
    )
    numbers = sorted((int(name) for name in names if name.isdecimal()), reverse=True)
    found: list[int] = []
    looked_at = 0
    # Not all are looked at: 1.7 s for the metadata of 28,800 shards.
    for number in numbers:
        if len(found) == _MOST_NAMED:
            break
        looked_at += 1
        if defect(directory / f"iter_{number:07d}") is None:
            found.append(number)
    others = len(numbers) - looked_at
    listed = ", ".join(map(str, reversed(found)))
    return (f"{others} others, " if others else "") + (listed or "none")
