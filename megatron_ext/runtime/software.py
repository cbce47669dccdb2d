"""Which code a run is computed by: told at its start, kept in its checkpoints, compared when it goes on."""

from __future__ import annotations

import logging
import os
from argparse import Namespace
from typing import Any

import torch

from megatron_ext.checkpoint.source import Start
from megatron_ext.preflight import facts

logger = logging.getLogger(__name__)

# By the name of `facts.versions`, or of what is recorded beside it; what a line says is in this order.
_TOLD = ("commit", "checkout", "megatron-core", "torch", "transformer-engine")


def record(args: Namespace) -> None:
    """Set ``args.software`` on rank 0, which is where files are read: names and versions, as text.

    ``edited`` says whether tracked files differ from the commit; ``checkout`` is a digest of the code that
    ran, whatever the commit says, and ``job`` is Slurm's number.

    Args:
        args: Megatron's validated arguments. On other ranks the value is ``None`` until :func:`share`.
    """
    args.software = None
    if args.rank == 0:
        found = facts.versions() | {"edited": facts.edited()}
        args.software = found | {"job": os.environ.get("SLURM_JOB_ID", "none")}


def share(args: Namespace) -> None:
    """Give all ranks what rank 0 has recorded; Megatron compares their arguments when it saves."""
    shared: list[Any] = [args.software]
    torch.distributed.broadcast_object_list(shared, src=0)
    args.software = shared[0]


def describe(software: dict[str, str]) -> str:
    """One line: commit, digest of the code, versions, job."""
    found = {name: software[name] for name in _TOLD}
    if software["edited"] == "yes":
        found["commit"] += " (edited)"
    if software["job"] != "none":
        found["job"] = software["job"]
    return "software:  " + ", ".join(f"{name} {value}" for name, value in found.items())


def tell_changes(args: Namespace, start: Start) -> None:
    """Say what computes the rest of a run otherwise than the part before.

    Args:
        args: Megatron's validated arguments.
        start: where the run begins.
    """
    before = start.recorded("software")  # an older version, or stock Megatron, recorded none
    if args.software is None or start.before is None or not isinstance(before, dict):
        return
    others = [
        f"{name} {before[name]}, now {found}"
        for name, found in args.software.items()
        if name not in ("job", "edited") and before.get(name, found) != found
    ]
    if others:
        logger.warning("software: until iteration %d %s", start.before.iteration, "; ".join(others))
