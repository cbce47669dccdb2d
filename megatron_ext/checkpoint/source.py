"""Where a run's weights come from, decided once and by one rank (see first_rank.py).

Megatron decides by itself too, when it loads; :func:`resolve_start` follows its rules, so that the
reference, the checks and the load all mean the same checkpoint.
"""

from __future__ import annotations

import logging
import math
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_ext.checkpoint.inspect import (
    TRACKER,
    Checkpoint,
    check_architecture,
    folder_name,
    has_checkpoint,
    open_checkpoint,
    tracked,
)
from megatron_ext.checkpoint.recovery import last_good
from megatron_ext.config import UnlearnConfig
from megatron_ext.data.atomic import replace_file
from megatron_ext.exceptions import CheckpointError, ConfigError
from megatron_ext.values import saves_where_it_loads

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Start:
    """The checkpoint that a run begins with.

    Attributes:
        checkpoint: what will be loaded; ``None`` starts from random weights.
        flag: the flag that named it.
        resumed: whether iterations, optimizer and the order of the data go on from it.
    """

    checkpoint: Checkpoint | None
    flag: str
    resumed: bool

    @property
    def before(self) -> Checkpoint | None:
        """The checkpoint that the run goes on from; ``None`` where it begins at iteration 0."""
        return self.checkpoint if self.resumed else None

    def recorded(self, name: str) -> Any:
        """An argument of the run that is resumed; ``None`` if it recorded none, or none is resumed."""
        return None if self.before is None else getattr(self.before.args, name, None)


def resolve_start(args: Namespace, *, required: bool) -> Start:
    """Find the checkpoint that Megatron will load.

    A run that goes on from its own checkpoints takes the last complete one of them, see
    :func:`last_good`; any other checkpoint that is named must be complete.

    Args:
        args: Megatron's validated arguments.
        required: whether random weights would be a mistake.

    Raises:
        CheckpointError: it is missing where the run cannot do without, unreadable, or of another model.
        ConfigError: each restart would go back to ``--ckpt-step``, or all that another run's checkpoint
            holds would have to be read.
    """
    _check_step(args)
    older = None
    if not args.finetune and not args.ckpt_step and args.load and Path(args.load).is_dir():
        older = _go_on_from_complete(args)
    step = args.ckpt_step or None  # Megatron ignores 0
    if older is not None or has_checkpoint(args.load):
        start = Start(
            open_checkpoint(args.load, flag="--load", iteration=step, folder=older),
            "--load",
            resumed=not args.finetune,
        )
    elif args.pretrained_checkpoint is not None:
        flag = "--pretrained-checkpoint"
        opened = open_checkpoint(args.pretrained_checkpoint, flag=flag, iteration=step)
        start = Start(opened, flag, resumed=False)
    elif required or _must_load(args):
        opened = open_checkpoint(args.load, flag="--load", iteration=step)
        start = Start(opened, "--load", resumed=False)
    else:
        return Start(None, "--load", resumed=False)
    assert start.checkpoint is not None
    if args.dist_ckpt_strictness == "raise_all" and not start.resumed:
        raise ConfigError(
            "--dist-ckpt-strictness: expected another value where only weights are read of "
            f"{start.checkpoint.path}, found raise_all, which asks for all that it holds"
        )
    check_architecture(start.checkpoint, args, flag=start.flag)
    return start


def _saves(args: Namespace) -> bool:
    """Whether the run writes checkpoints of its own to ``--save``."""
    return bool(args.save) and not args.skip_train and args.ckpt_convert_format is None


def _check_step(args: Namespace) -> None:
    """Refuse to go back by a flag that a restart, which has the same command line, would go back by again.

    Raises:
        ConfigError: ``--ckpt-step`` is before the latest checkpoint of one directory for both.
    """
    if not (args.ckpt_step and _saves(args) and saves_where_it_loads(args)):
        return
    latest = tracked(args.load) or ""
    if latest.isdecimal() and int(latest) > args.ckpt_step:
        raise ConfigError(
            f"--ckpt-step: expected the latest iteration of --load and --save {args.load}, {latest}, found "
            f"{args.ckpt_step}; each restart would go back again and overwrite the later checkpoints. To "
            f"go back once, leave the flag out and write {args.ckpt_step} into {Path(args.load) / TRACKER}"
        )


def _must_load(args: Namespace) -> bool:
    """Whether `--load` cannot be meant to be empty: the run's own checkpoints will not be there.

    Megatron warns, among a thousand lines, and trains from random weights.
    """
    return bool(args.load) and (args.finetune or args.skip_train or not saves_where_it_loads(args))


def _go_on_from_complete(args: Namespace) -> str | None:
    """Hand Megatron the last complete checkpoint of ``--load`` where it would take a broken one.

    Its ``--ckpt-step`` wins over the tracker file. A tracker file that is gone or unreadable it needs
    nevertheless, or it would start anew, or end the run as a success; rank 0 writes it again.

    Returns:
        The name of the folder, the same on all ranks whether that is written yet or not; ``None`` where
        the tracker file says what to load, or there is nothing to load.
    """
    directory = Path(args.load)
    choice = last_good(directory, flag="--load")
    if choice is None:
        return None
    if args.rank == 0:
        logger.warning("%s", choice.reason)
    if choice.iteration is None:
        return None
    if not choice.tracker_is_lost:
        args.ckpt_step = choice.iteration
    elif args.rank == 0:
        try:
            replace_file(directory / TRACKER, str(choice.iteration).encode())
        except OSError as error:
            raise CheckpointError(f"{directory / TRACKER} cannot be written: {error}") from error
    return folder_name(choice.iteration)


def refuse_overwriting(args: Namespace, start: Start) -> None:
    """Refuse to write over later checkpoints in ``--save`` of a run that is not gone on from.

    Most often ``--load`` was forgotten or names where the run came from: it would begin there again each
    time that its job is started again, and ``--save-retain-interval`` would delete what was there.

    Args:
        args: Megatron's validated arguments.
        start: where the run begins.

    Raises:
        ConfigError: there are such checkpoints, and ``--overwrite-checkpoints`` is not given.
    """
    if not _saves(args) or args.overwrite_checkpoints:
        return
    first = 0 if start.before is None else start.before.iteration
    own = start.resumed and saves_where_it_loads(args)
    latest = tracked(args.save) or ""
    if not own and latest.isdecimal() and int(latest) > first:
        raise ConfigError(
            f"--save {args.save}: expected no later checkpoint there than the run begins at, iteration "
            f"{first}, found that of iteration {latest}; to resume it use --load {args.save}, without "
            "--finetune, or name another folder; --overwrite-checkpoints writes over it"
        )


@dataclass(frozen=True)
class ReferenceSource:
    """Which checkpoint the reference is, and what an earlier part of the run recorded of it.

    Attributes:
        checkpoint: the checkpoint to load.
        recorded_digest: the digest that the resumed checkpoint recorded, ``None`` in a new run.
    """

    checkpoint: Checkpoint
    recorded_digest: str | None


def find_reference(args: Namespace, config: UnlearnConfig, start: Start) -> ReferenceSource:
    """Decide which checkpoint the reference is.

    A new run takes ``--reference-load``, or else the checkpoint that it starts from. A resumed run takes
    the one that its checkpoint recorded; taking the resumed student instead would silently change the
    objective.

    Raises:
        CheckpointError: the checkpoint is missing, unreadable or of another model.
        ConfigError: the run would overwrite it.
    """
    flag = "--reference-load"
    recorded = start.recorded("unlearn_reference")
    if recorded is not None:
        directory = config.reference_load or recorded["directory"]
        if not Path(directory).is_dir():
            raise CheckpointError(
                f"{flag}: expected the reference that {args.load} was unlearned against, found nothing at "
                f"{directory}; name its new place with {flag}"
            )
        named = config.reference_load or args.pretrained_checkpoint or directory
        if Path(named).resolve() != Path(directory).resolve() and args.rank == 0:
            logger.warning(
                "--pretrained-checkpoint %s: not read, because the run resumes from --load %s, against the "
                "reference that it was started with, %s",
                *(named, args.load, directory),
            )
        opened = open_checkpoint(directory, flag=flag, folder=recorded["folder"])
        source = ReferenceSource(opened, recorded["digest"])
    elif config.reference_load is not None:
        source = ReferenceSource(open_checkpoint(config.reference_load, flag=flag), None)
    elif start.resumed:
        raise CheckpointError(
            f"{flag}: expected the reference's checkpoint, because {args.load} was unlearned without one so "
            "far, and an unlearned model cannot be its own reference; found none"
        )
    else:
        assert start.checkpoint is not None
        source = ReferenceSource(start.checkpoint, None)
    check_architecture(source.checkpoint, args, flag=flag)
    check_kept(args, start, source.checkpoint)
    return source


def check_kept(args: Namespace, start: Start, reference: Checkpoint) -> None:
    """The run must not write over its reference, which each resume needs, nor delete it.

    Args:
        args: Megatron's validated arguments.
        start: where the run begins.
        reference: the reference's checkpoint.

    Raises:
        ConfigError: a folder that the run has still to write is the reference's, or its first save would
            delete that one.
    """
    if not args.save or args.skip_train or reference.path.name == "release":
        return
    resumed = 0 if start.before is None else start.before.iteration
    last = args.train_iters or math.inf  # not known yet with --train-samples
    place = Path(args.save) / reference.path.name
    same = place.resolve() == reference.path.resolve()
    # Megatron deletes what the tracker file has named before a save, unless it is a link.
    kept = args.save_retain_interval
    is_deleted = kept and reference.iteration % kept and not place.is_symlink()
    if same and is_deleted and tracked(args.save) == str(reference.iteration):
        raise ConfigError(
            f"--save: expected another directory than {args.save}, found the reference's: by "
            f"--save-retain-interval {kept} the first save would delete {reference.path}"
        )
    if same and resumed < reference.iteration <= last:
        raise ConfigError(
            f"--save: expected another directory than {args.save}, found the reference's: iteration "
            f"{reference.iteration} of this run would overwrite {reference.path}"
        )
