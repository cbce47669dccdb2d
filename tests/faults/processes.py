"""A run that is started to be killed: its ranks, forked or under torchrun, and all that they started."""

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence

import psutil

from tests.helpers import forked
from tests.helpers.entry import ENTRY, ROOT

LIMIT = 60.0  # seconds in which a run must end, with all its processes, once a rank has died


class HangError(AssertionError):
    """A process that still runs when it should have ended."""


class Attempt:
    """One start of the command; a process of its own for each rank.

    Args:
        command: flags of the entry point.
        torchrun: start it as a user does, which takes seconds longer; else the ranks are forks of this
            process, and this process ends the others when one has died, as torchrun would.
    """

    def __init__(self, command: Sequence[object], *, torchrun: bool, ranks: int = 2) -> None:
        words = [str(ENTRY), *map(str, command)]
        self.launcher: subprocess.Popen | None = None
        self.started: dict[int, psutil.Process] = {}
        self.looked = 0.0
        if torchrun:
            self.output = tempfile.TemporaryFile()  # noqa: SIM115 -- dropped with the attempt
            launcher = [sys.executable, "-m", "torch.distributed.run", "--rdzv-backend", "c10d"]
            launcher += ["--rdzv-endpoint", "localhost:0", "--nproc-per-node", str(ranks)]
            self.launcher = subprocess.Popen(
                [*launcher, *words],
                **{"cwd": ROOT, "stdout": self.output, "stderr": subprocess.STDOUT},
                env=os.environ | {"OMP_NUM_THREADS": "1"},
            )
        else:
            self.forks = forked.start(0, words, ranks)
            self.output = self.forks.output

    def ranks(self) -> list[psutil.Process]:
        """The ranks that live, in order."""
        if self.launcher is None:
            return [psutil.Process(pid) for pid in sorted(self.forks.ranks)]
        try:
            return psutil.Process(self.launcher.pid).children()
        except psutil.NoSuchProcess:
            return []

    def running(self) -> bool:
        """Whether it has not ended; takes note of what has."""
        if time.monotonic() > self.looked + 0.2:  # a look at all processes takes 20 ms
            self._remember()
        if self.launcher is not None:
            return self.launcher.poll() is None
        for pid in list(self.forks.ranks):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                self.forks.ended(pid, status)
        return bool(self.forks.ranks)

    @property
    def code(self) -> int:
        """Exit code, once it has ended."""
        return self.forks.code if self.launcher is None else int(self.launcher.returncode)

    def text(self) -> str:
        """What it printed."""
        self.output.seek(0)
        return self.output.read().decode(errors="replace")

    def kill_one(self, index: int) -> None:
        """`kill -9` of one rank."""
        self._remember()
        ranks = self.ranks()
        if ranks:
            ranks[index % len(ranks)].send_signal(signal.SIGKILL)

    def children(self) -> list[psutil.Process]:
        """What the ranks have started that lives."""
        self._remember()
        ranks = [rank.pid for rank in self.ranks()]
        return [child for pid, child in self.started.items() if pid not in ranks and _alive(child)]

    def kill_all(self) -> None:
        """`kill -9` of everything at once, as when a machine goes down."""
        self._remember()
        if self.launcher is not None:
            self.launcher.kill()
        for process in self.started.values():
            try:
                process.kill()
            except psutil.NoSuchProcess:
                continue

    def wait(self, limit: float) -> None:
        """Wait for its end and that of everything it started.

        Raises:
            HangError: it did not end in time; it is killed.
        """
        deadline = time.monotonic() + limit
        while self.running() or self._orphans():
            if time.monotonic() > deadline:
                left = [" ".join(process.cmdline()[:4]) for process in self._orphans()]
                self.kill_all()
                raise HangError(f"still running after {limit:g} s: {left}\n{self.text()[-4000:]}")
            time.sleep(0.01)

    def _orphans(self) -> list[psutil.Process]:
        """What outlives the ranks: the process that Megatron starts for its checkpoints would."""
        return [process for process in self.started.values() if _alive(process)]

    def _remember(self) -> None:
        self.looked = time.monotonic()
        for rank in self.ranks():
            self.started[rank.pid] = rank
            try:
                for child in rank.children(recursive=True):
                    self.started[child.pid] = child
            except psutil.NoSuchProcess:
                continue


def _alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
