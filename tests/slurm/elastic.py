"""Two torchrun "nodes" over loopback, one of them lost and started again: `make slurm-test`; needs no Slurm.

Each node starts what srun starts on a node of a job, examples/slurm/node.sh, with the variables that Slurm
would set.
"""

import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from megatron_ext.runtime.children import end_with_parent
from tests.faults.world import STEPS, Place, Result, command, read_result, undisturbed
from tests.helpers.entry import ENTRY, ROOT
from tests.slurm.cluster import tail, wait_until

LIMIT = 600.0  # seconds; a quiet machine takes a sixth
LAYOUT = "DP 2"


class Nodes:
    """Both nodes of one run; the first keeps the rendezvous."""

    def __init__(self, tiny, directory: Path) -> None:
        self.place = Place(directory)
        directory.mkdir()
        self.words = [str(word) for word in command(tiny, self.place, LAYOUT)]
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.logs = [directory / f"node{number}.log" for number in range(2)]
        self.launchers = [self.start(number) for number in range(2)]

    def start(self, number: int) -> subprocess.Popen:
        """Start a node."""
        variables = {
            **{"SLURM_JOB_ID": "7", "SLURM_NODEID": str(number), "OUT": str(self.place.directory)},
            **{"SLURMD_NODENAME": f"127.0.0.{number + 1}", "OMP_NUM_THREADS": "1"},
        }
        words = [
            *("bash", ROOT / "examples" / "slurm" / "node.sh"),
            *(
                sys.executable,
                "-m",
                "torch.distributed.run",
                "--nnodes",
                "2",
                "--nproc-per-node",
                "1",
            ),
            *("--max-restarts", "3", "--rdzv-id", "7", "--rdzv-backend", "c10d"),
            *("--rdzv-endpoint", f"127.0.0.1:{self.port}", "--redirects", "3", "--tee", "3"),
        ]
        with self.logs[number].open("ab") as log:
            return subprocess.Popen(
                [*words, ENTRY, *self.words],
                **{"cwd": ROOT, "env": os.environ | variables, "stdout": log, "stderr": log},
                preexec_fn=end_with_parent,  # if the tests are killed
            )

    def lose(self, number: int) -> None:
        """`kill -9` of a node's torchrun and all that it started, as when the machine goes down."""
        launcher = psutil.Process(self.launchers[number].pid)
        for process in (launcher, *launcher.children(recursive=True)):
            try:
                process.kill()
            except psutil.NoSuchProcess:
                continue
        self.launchers[number].wait()

    def until_saved(self) -> None:
        """Wait for the first checkpoint."""
        wait_until(lambda: self.place.latest() >= 2, LIMIT, "checkpoint", self.text)

    def end(self) -> list[int]:
        """Wait for both; their exit codes."""
        wait_until(
            lambda: all(launcher.poll() is not None for launcher in self.launchers),
            *(LIMIT, "end of both nodes", self.text),
        )
        return [int(launcher.returncode) for launcher in self.launchers]

    def text(self) -> str:
        """The ends of both logs."""
        return "\n".join(map(tail, self.logs))

    def close(self) -> None:
        """End what still runs."""
        for number, launcher in enumerate(self.launchers):
            if launcher.poll() is None:
                self.lose(number)


@pytest.fixture
def nodes(tiny, tmp_path) -> Iterator[Nodes]:
    started = Nodes(tiny, tmp_path / "run")
    yield started
    started.close()


@pytest.fixture(scope="module")
def expected(tiny, tmp_path_factory) -> Result:
    return undisturbed(tiny, Place(tmp_path_factory.mktemp("undisturbed")), LAYOUT)


def test_a_lost_node_that_comes_back_goes_on_and_ends_as_if_nothing_had_happened(nodes, expected):
    nodes.until_saved()
    nodes.lose(1)
    assert nodes.place.latest() < STEPS
    nodes.launchers[1] = nodes.start(1)
    assert nodes.end() == [0, 0], nodes.text()
    assert expected.difference(read_result(nodes.place)) is None
    # The node that stayed kept its torchrun and started its rank a second time.
    attempts = (nodes.place.directory / "logs" / "7.0").glob("127.0.0.1/*/attempt_1")
    assert len(list(attempts)) == 1


def test_without_the_first_node_the_other_ends_with_the_cause(nodes):
    """The rendezvous is lost with it: not torchrun but Slurm has to start the run again."""
    nodes.until_saved()
    nodes.lose(0)
    begin = time.monotonic()
    assert nodes.end()[1] != 0
    assert time.monotonic() - begin < 120
    assert re.search(r"RendezvousConnectionError|C10d store has failed", nodes.logs[1].read_text())
