"""Which checkpoint a run goes on from when its latest one is broken.

Megatron believes the tracker file: a folder that was cut short ends in a traceback, a tracker file that
is gone starts the run anew, and an empty one (a full disk leaves it) ends the run with exit code 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from megatron_ext.checkpoint.complete import MARKS, defect
from megatron_ext.checkpoint.inspect import TRACKER, folder_name, tracked
from megatron_ext.exceptions import CheckpointError


@dataclass(frozen=True)
class Recovery:
    """What to go on from instead of the latest checkpoint.

    Attributes:
        iteration: the last complete one; ``None`` starts from the beginning, because no save came to its
            end.
        tracker_is_lost: whether the tracker file is gone or unreadable.
        reason: one line for the user.
    """

    iteration: int | None
    tracker_is_lost: bool
    reason: str


def last_good(directory: Path, *, flag: str) -> Recovery | None:
    """Look for the last complete checkpoint if the latest is not.

    Args:
        directory: what the flag names.
        flag: the flag, for messages.

    Returns:
        ``None`` if the directory holds no checkpoint at all, a release, or a latest one that is complete.

    Raises:
        CheckpointError: checkpoints were written, and none of them is complete.
    """
    tracker, text = directory / TRACKER, tracked(directory)
    if text == "release":
        return None
    lost = text is None or not text.isdecimal()
    if text is None:
        reason = f"{tracker} is missing"
    elif lost:
        reason = f"{tracker}: expected an iteration number or 'release', found {text!r}"
    else:
        broken = defect(folder(directory, int(text)))
        if broken is None:
            return None
        reason = f"{folder(directory, int(text))} is broken ({broken})"
    found = _iterations(directory)
    if text is None and not found:
        return None
    if text is not None and not lost:
        # A newer folder was never finished, or belongs to what was gone on from an older iteration.
        found = [iteration for iteration in found if iteration < int(text)]
    return _choose(directory, found, reason, lost=lost, began=text is None, flag=flag)


def _choose(
    directory: Path, found: list[int], reason: str, *, lost: bool, began: bool, flag: str
) -> Recovery:
    defects = []
    for iteration in found:
        path = folder(directory, iteration)
        if (broken := defect(path)) is None:
            return Recovery(iteration, lost, f"{flag}: {reason}; going on from {path}")
        defects.append(f"{path.name}: {broken}")
    # Saves end in their order; several may have begun, if they are asynchronous.
    if began and found and not any(_was_ending(folder(directory, newer)) for newer in found[:-1]):
        return Recovery(
            None,
            lost,
            f"{flag}: {reason} and no checkpoint was finished ({defects[-1]}); starting from the beginning",
        )
    others = f" ({'; '.join(defects)})" if defects else ""
    raise CheckpointError(
        f"{flag}: {reason}; expected an older complete checkpoint to go on from, found none{others}"
    )


def _was_ending(path: Path) -> bool:
    """Whether a save had written all tensors of a checkpoint."""
    return any((path / mark).exists() for mark in MARKS)


def folder(directory: Path, iteration: int) -> Path:
    """Where Megatron saves an iteration."""
    return directory / folder_name(iteration)


def _iterations(directory: Path) -> list[int]:
    """Iterations that a directory has a folder of, complete or not, the newest first."""
    names = (path.name.removeprefix("iter_") for path in directory.glob("iter_*"))
    return sorted((int(name) for name in names if name.isdecimal()), reverse=True)
