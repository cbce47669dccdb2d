"""Which checkpoint the frozen reference is, decided before any process group exists."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_ext.checkpoint.inspect import (
    Checkpoint,
    check_architecture,
    has_checkpoint,
    open_checkpoint,
)
from megatron_ext.config import UnlearnConfig
from megatron_ext.exceptions import CheckpointError


@dataclass(frozen=True)
class ReferenceSource:
    """Which checkpoint the reference is, and what an earlier part of the run recorded of it.

    Attributes:
        checkpoint: the checkpoint to load.
        recorded_digest: the digest that the resumed checkpoint recorded, ``None`` in a new run.
    """

    checkpoint: Checkpoint
    recorded_digest: str | None


def find_reference(args: Namespace, config: UnlearnConfig) -> ReferenceSource:
    """Decide which checkpoint the reference is, before any process group exists.

    A new run takes ``--reference-load``, or else the checkpoint that it starts from. A resumed run takes
    the one that its checkpoint recorded; taking the resumed student instead would silently change the
    objective.

    Raises:
        CheckpointError: the checkpoint is missing, unreadable or of another model.
    """
    recorded = _recorded_reference(args)
    if recorded is None:
        flag, directory = "--reference-load", config.reference_load
        if directory is None:
            flag = "--load" if has_checkpoint(args.load) else "--pretrained-checkpoint"
            directory = args.load if has_checkpoint(args.load) else args.pretrained_checkpoint
        # Without --pretrained-checkpoint an empty --load must be reported, not taken for a fresh start.
        flag, directory = (flag, directory) if directory is not None else ("--load", args.load)
        source = ReferenceSource(open_checkpoint(directory, flag=flag), None)
    else:
        flag = "--reference-load"
        directory = config.reference_load or recorded["directory"]
        if not Path(directory).is_dir():
            raise CheckpointError(
                f"{flag}: expected the reference that {args.load} was unlearned against, found nothing at "
                f"{directory}; name its new place with {flag}"
            )
        opened = open_checkpoint(directory, flag=flag, iteration=recorded["iteration"])
        source = ReferenceSource(opened, recorded["digest"])
    check_architecture(source.checkpoint, args, flag=flag)
    return source


def _recorded_reference(args: Namespace) -> dict[str, Any] | None:
    """What the checkpoint to be resumed recorded of its reference; ``None`` in a new run."""
    if args.finetune or not has_checkpoint(args.load):
        return None
    return getattr(open_checkpoint(args.load, flag="--load").args, "unlearn_reference", None)
