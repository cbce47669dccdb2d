"""Notices that another run saves into the same directory, as when a job was submitted twice."""

from __future__ import annotations

import os
from pathlib import Path

from megatron_ext.checkpoint.inspect import folder_name
from megatron_ext.exceptions import CheckpointError


class OneWriter:
    """What one run knows of the checkpoints in its ``--save``.

    A lock would need a file system that keeps one over nodes, and would outlive a run that was killed.

    torchrun starts a run again that has failed. It would then find the checkpoints of the other run, and
    go on from them until its next save. In a job of Slurm's a note with the job's number says that it has
    ended for good, which ``examples/slurm/job.sh`` looks for too; elsewhere runs have no name of their own
    (many are started with one and the same ``--rdzv-id``).
    """

    def __init__(self) -> None:
        self._known: set[str] | None = None

    def begin(self, directory: str | Path) -> None:
        """Note what is there before this run has saved anything.

        Raises:
            CheckpointError: this run was ended by `claim` before torchrun started it again.
        """
        if note := _note(directory):
            if note.is_file() and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0":
                raise CheckpointError(note.read_text())
            note.unlink(missing_ok=True)
        self._known = _folders(directory)

    def claim(self, directory: str | Path, iteration: int) -> None:
        """Note that this run is about to save.

        Raises:
            CheckpointError: a checkpoint is there that was neither found at the start nor saved since.
        """
        if self._known is None:
            return
        if foreign := _folders(directory) - self._known:
            reason = (
                f"--save {directory}: expected the checkpoints that were there when this run began and its "
                f"own, found {max(foreign)}, which another run has saved since; two runs in one directory "
                f"overwrite each other, so this one ends and leaves iteration {iteration} unsaved"
            )
            if note := _note(directory):
                note.write_text(reason)
            raise CheckpointError(reason)
        self._known.add(folder_name(iteration))


def _folders(directory: str | Path) -> set[str]:
    return {path.name for path in Path(directory).glob("iter_*")}


def _note(directory: str | Path) -> Path | None:
    """Where a job notes that another one saves there; `None` without Slurm."""
    job = os.environ.get("SLURM_JOB_ID")
    return Path(directory) / f"ended_for_another_run.{job}" if job else None
