"""An unlearning run as a job of the test's own Slurm."""

from pathlib import Path

import psutil

from tests.faults.world import STEPS, Result, read_result
from tests.helpers.entry import ROOT
from tests.slurm.cluster import Cluster, tail, wait_until
from tests.slurm.world import World

UNLEARN = ROOT / "examples" / "slurm" / "unlearn.sbatch"
# Seconds in which a start, or what follows a disturbance, must have happened; a quiet machine takes a tenth.
LIMIT = 600.0


class Job:
    """An unlearning run from the base on two nodes, one rank each."""

    def __init__(self, cluster: Cluster, world: World, base: Path, name: str, **more: str) -> None:
        self.cluster = cluster
        self.output, settings = world.job(name, SYNTH_LM=str(base), GPUS_PER_NODE="1", **more)
        self.log = world.directory / f"{name}.log"
        words = ("--output", self.log, UNLEARN)
        self.number = cluster.submit(*words, settings=settings, directory=ROOT)

    def until_saved(self, iteration: int = 2) -> None:
        """Wait for a checkpoint, so that what follows happens in the middle of the run."""
        wait_until(
            lambda: self.output.latest() >= iteration,
            *(LIMIT, f"iteration {iteration}", lambda: tail(self.log)),
        )

    def until_back(self) -> int:
        """Wait until Slurm has started it again; the iteration of the checkpoint that it then finds."""

        def back() -> bool:
            state = self.cluster.state(self.number)
            return (state.get("Restarts"), state.get("JobState")) == ("1", "RUNNING")

        wait_until(back, *(LIMIT, "requeue", lambda: tail(self.log)))
        saved = self.output.latest()
        assert 2 <= saved < STEPS, tail(self.log)
        return saved

    def result(self) -> Result:
        """Wait for its good end; what it left."""
        state = self.cluster.wait(self.number, LIMIT, self.log)
        assert state == "COMPLETED", tail(self.log)
        return read_result(self.output)


def rank_of(job: Job) -> psutil.Process:
    """The job's rank on its second node; it has started children, which have its variables too."""
    wanted = {"SLURM_JOB_ID": str(job.number), "SLURM_NODEID": "1", "RANK": "1"}
    for process in psutil.process_iter(["cmdline"]):
        if str(ROOT / "pretrain_unlearn.py") not in (process.info["cmdline"] or []):
            continue
        if wanted.items() <= process.environ().items():
            return process
    raise AssertionError(f"no rank of job {job.number} on the second node\n{tail(job.log)}")
