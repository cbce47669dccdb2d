"""Notices that another run saves into the same directory, as when a job was submitted twice."""

from __future__ import annotations

from pathlib import Path

from megatron_ext.checkpoint.inspect import folder_name
from megatron_ext.exceptions import CheckpointError


class OneWriter:
    """What one run knows of the checkpoints in its ``--save``.

    A lock would need a file system that keeps one over nodes, and would outlive a run that was killed.
    """

    def __init__(self) -> None:
        self._known: set[str] | None = None

    def begin(self, directory: str | Path) -> None:
        """Note what is there before this run has saved anything."""
        self._known = _folders(directory)

    def claim(self, directory: str | Path, iteration: int) -> None:
        """Note that this run is about to save.

        Raises:
            CheckpointError: a checkpoint is there that was neither found at the start nor saved since.
        """
        if self._known is None:
            return
        if foreign := _folders(directory) - self._known:
            raise CheckpointError(
                f"--save {directory}: expected the checkpoints that were there when this run began and its "
                f"own, found {max(foreign)}, which another run has saved since; two runs in one directory "
                f"overwrite each other, so this one ends and leaves iteration {iteration} unsaved"
            )
        self._known.add(folder_name(iteration))


def _folders(directory: str | Path) -> set[str]:
    return {path.name for path in Path(directory).glob("iter_*")}
