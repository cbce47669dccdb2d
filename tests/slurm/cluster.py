"""A Slurm of its own on this machine: munge, the controller and nodes, from Debian's packages.

Configuration, keys, spools and logs lie in a folder of the test; ports are free ones; nothing of a Slurm that
the machine may have is read or changed. Nodes are slurmd processes with names that are addresses of the
loopback device, so that each name resolves as on a cluster.
"""

import getpass
import os
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path

import psutil

from megatron_ext.runtime.children import end_with_parent

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel")
PACKAGES = "slurmctld slurmd slurm-client munge"

# No cgroup, no accounting, no time between a submission and its start. Requeued jobs wait for their
# credentials to expire (two minutes by default). Nodes claim GPUs, as the job scripts ask for them.
CONFIGURATION = """\
ClusterName=test
SlurmctldHost=localhost(127.0.0.1)
SlurmUser={user}
SlurmdUser={user}
SlurmctldPort={ports[0]}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
PlugStackConfig=/dev/null
MailProg=/bin/true
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/builtin
SchedulerParameters=batch_sched_delay=0,sched_interval=1
SlurmdParameters=config_overrides
ReturnToService=2
KillWait=60
GresTypes=gpu
NodeName={names[0]} NodeHostname=localhost Port={ports[1]} CPUs=8 Gres=gpu:8
NodeName={names[1]} NodeHostname=localhost Port={ports[2]} CPUs=8 Gres=gpu:8
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP GraceTime=120
PartitionName=urgent Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
"""
NAMES = ("127.0.0.1", "127.0.0.2")


def missing() -> str | None:
    """Which programs are not here and how to get them; None if nothing is missing."""
    absent = [name for name in PROGRAMS if _program(name) is None]
    if not absent:
        return None
    return (
        f"make slurm-test: expected {', '.join(PROGRAMS)}, found no {', '.join(absent)}; on Debian, as "
        f"root: apt-get update && apt-get install -y {PACKAGES}"
    )


class Cluster:
    """Two nodes of one task each; `close` ends all that was started.

    Args:
        folder: of an absolute path shorter than 80 characters, for munge's socket.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = os.environ | {"SLURM_CONF": str(folder / "slurm.conf")}
        self.jobs: list[int] = []
        self.daemons = ExitStack()
        (folder / "state").mkdir(parents=True)
        key = folder / "munge.key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o400)
        settings = {"folder": folder, "names": NAMES, "ports": free_ports(3)}
        (folder / "slurm.conf").write_text(CONFIGURATION.format(user=getpass.getuser(), **settings))
        for number in range(8):  # what stands for the devices' files
            (folder / f"gpu{number}").touch()
        (folder / "gres.conf").write_text(f"Name=gpu File={folder}/gpu[0-7]\n")
        try:
            self._start()
        except BaseException:
            self.close()
            raise

    def _start(self) -> None:
        files = {
            name: self.folder / f"munge.{name}" for name in ("key", "socket", "pid", "log", "seed")
        }
        self._daemon(
            *("munged", "--foreground", "--force", f"--key-file={files['key']}"),
            *(f"--socket={files['socket']}", f"--pid-file={files['pid']}"),
            *(f"--log-file={files['log']}", f"--seed-file={files['seed']}"),
        )
        wait_until(files["socket"].exists, 20, "munge's socket")
        self._daemon("slurmctld", "-D", "-i")
        for name in NAMES:
            (self.folder / f"spool-{name}").mkdir()
            self._daemon("slurmd", "-D", "-N", name)
        wait_until(
            lambda: self.ask("sinfo", "--noheader", "--format=%T %D") == "idle 2", 60, "idle nodes"
        )

    def _daemon(self, name: str, *words: str) -> None:
        program = _program(name)
        assert program is not None
        output = (self.folder / "daemons.log").open("ab")
        process = subprocess.Popen(
            [program, *words],
            **{"env": self.environment, "stdout": output, "stderr": output},
            preexec_fn=end_with_parent,  # if the tests are killed
        )
        output.close()
        self.daemons.callback(_end, process)

    def ask(self, program: str, *words: object) -> str:
        """What a client prints; empty if it fails."""
        result = subprocess.run(
            [program, *map(str, words)],
            **{"env": self.environment, "capture_output": True, "text": True, "timeout": 60},
        )
        return result.stdout.strip() if result.returncode == 0 else ""

    def submit(self, *words: object, settings: Mapping[str, str], directory: Path) -> int:
        """Submit with sbatch, from a directory; the job's number."""
        result = subprocess.run(
            ["sbatch", "--parsable", *map(str, words)],
            **{"env": self.environment | dict(settings), "cwd": directory},
            **{"capture_output": True, "text": True, "timeout": 60},
        )
        assert result.returncode == 0, result.stderr
        self.jobs.append(int(result.stdout))
        return self.jobs[-1]

    def state(self, job: int) -> dict[str, str]:
        """Slurm's record of a job."""
        text = self.ask("scontrol", "show", "job", job)
        return dict(re.findall(r"(\w+)=(\S*)", text))

    def wait(self, job: int, seconds: float, log: Path) -> str:
        """Wait for its end, requeues included, and return its state: COMPLETED, FAILED, ..."""
        over = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "BOOT_FAIL")
        wait_until(
            lambda: self.state(job).get("JobState") in over,
            *(seconds, f"end of job {job}", lambda: tail(log)),
        )
        return self.state(job)["JobState"]

    def close(self) -> None:
        """Cancel all jobs, wait for their processes, end the daemons."""
        if self.jobs:
            self.ask("scancel", "--signal=KILL", "--full", *self.jobs)
            self.ask("scancel", *self.jobs)
            deadline = time.monotonic() + 30
            while self.ask("squeue", "--noheader") and time.monotonic() < deadline:
                time.sleep(0.5)
        self.daemons.close()
        for process in psutil.process_iter():  # of a job that was still ending
            try:
                if process.environ().get("SLURM_CONF") == self.environment["SLURM_CONF"]:
                    process.kill()
            except psutil.Error:
                continue


def tail(log: Path) -> str:
    """The end of a log, for messages."""
    return log.read_text(errors="replace")[-4000:] if log.exists() else f"no {log}"


def wait_until(
    happened: Callable[[], bool], seconds: float, what: str, why: Callable[[], str] = str
) -> None:
    """Look every 0.1 s.

    Raises:
        AssertionError: it did not happen in time.
    """
    deadline = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < deadline, f"no {what} within {seconds:g} s\n{why()}"
        time.sleep(0.1)


def _program(name: str) -> str | None:
    # Debian's users do not have the folders of daemons in their path.
    return shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    try:
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
    finally:
        for one in sockets:
            one.close()


def _end(process: subprocess.Popen) -> None:
    process.terminate()
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
