"""A job of Slurm without one: its variables, and stand-ins that print what they are asked to do."""

import os
import subprocess
from pathlib import Path

from tests.helpers.entry import ROOT
from tests.helpers.recipes import executable

SLURM = ROOT / "examples" / "slurm"
JOB = {
    **{"SLURM_JOB_ID": "30123", "SLURM_NNODES": "4", "SLURM_JOB_NODELIST": "node[7-10]"},
    **{"SLURM_GPUS_ON_NODE": "4", "SLURM_SUBMIT_DIR": str(ROOT), "PYTHON": "python"},
}


def stand_ins(directory: Path) -> str:
    """PATH with programs that print what they are asked to do."""
    executable(directory / "srun", 'printf "%s\\n" srun "$@"')
    executable(directory / "scontrol", 'test "$3" = "node[7-10]" && printf "node7\\nnode8\\n"')
    return f"{directory}:{os.environ['PATH']}"


def preflight(programs: str, *words: str, **variables: str) -> subprocess.CompletedProcess:
    # Started from a copy and from elsewhere, as Slurm does.
    return subprocess.run(
        ["bash", str(SLURM / "preflight.sbatch"), *words],
        **{
            "cwd": "/",
            "env": {"PATH": programs} | JOB | variables,
            "text": True,
            "capture_output": True,
        },
    )
