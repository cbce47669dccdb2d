"""Who a process is among those that were started with it: by the variables of torchrun, or of srun."""

from __future__ import annotations

import os
from collections.abc import Mapping

# How messages go on where none of these says it.
EXPECTED = "expected a start by torchrun, or by srun with MASTER_ADDR and MASTER_PORT"
# The numbers of a step. A batch script has those of its job as well, SLURM_NTASKS for one, and is alone.
_SLURM = {
    "RANK": "SLURM_PROCID",
    "WORLD_SIZE": "SLURM_STEP_NUM_TASKS",
    "LOCAL_RANK": "SLURM_LOCALID",
}


def by_slurm(environment: Mapping[str, str]) -> dict[str, str]:
    """What Slurm says of a task, under torchrun's names."""
    return {name: environment[slurm] for name, slurm in _SLURM.items() if slurm in environment}


def variables(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment with torchrun's names: its own variables, or else Slurm's."""
    return {**by_slurm(environment), **environment}


def tasks_of_node(environment: Mapping[str, str]) -> int:
    """Tasks of this step on this node, from Slurm's `8(x3),7`: 8 on each of three nodes, 7 on the last."""
    counts: list[int] = []
    for part in environment.get("SLURM_STEP_TASKS_PER_NODE", "1").split(","):
        count, _, nodes = part.rstrip(")").partition("(x")
        counts += [int(count)] * int(nodes or 1)
    return counts[int(environment.get("SLURM_NODEID", "0"))]


def rank() -> str:
    """This process's rank, before there are process groups; ``0`` of one that runs alone."""
    return variables(os.environ).get("RANK", "0")


def looks_at_files() -> bool:
    """Whether this rank looks at the files of data and at folders before the start, and says what is wrong.

    One rank of a node does, where torchrun ends the others if it fails: a file server has less to do, and the
    user one line a node to read. Without torchrun nobody would end them. At checkpoints rank 0 looks for all,
    see first_rank.py.
    """
    return "TORCHELASTIC_RUN_ID" not in os.environ or os.environ.get("LOCAL_RANK") == "0"
