"""Runs the entry point in forks of one process that has imported it all.

A start costs 6 s of imports, for each rank, and torchrun 4 s more; a fork of a started process next to
nothing. It then runs `pretrain_unlearn.py` as `__main__`, with the environment that torchrun gives a
rank. The process is a server: a line of JSON asks for runs, a line of JSON answers.
"""

import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from megatron_ext.runtime import collector
from tests.helpers.entry import CORES, ROOT, Launch, Run, read_scalars, succeed

TIMEOUT = 300  # seconds; a rank that hangs is ended by a signal, and its run fails


class Server:
    """The process with everything imported; `close` ends it.

    Args:
        module: what it runs; it calls `main`.
    """

    def __init__(self, module: str = "tests.helpers.forked") -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", module],
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    def results(self, launches: Sequence[Launch]) -> list[tuple[int, str]]:
        """Exit code and output of each, as many at once as there are cores."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        asked = [
            ([str(launch.script), *map(str, launch.arguments)], launch.ranks) for launch in launches
        ]
        print(json.dumps(asked), file=self.process.stdin, flush=True)
        answer = self.process.stdout.readline()
        assert answer, f"the server ended with exit code {self.process.wait()}"
        return [(code, output) for code, output in json.loads(answer)]

    def tool(self, name: str, *arguments: object, ranks: int = 1) -> str:
        """Run one of the product's tools, which must succeed; its output."""
        launch = Launch(arguments, ranks, ROOT / "tools" / f"{name}.py")
        ((code, output),) = self.results([launch])
        assert code == 0, f"{name}: {output[-6000:]}"
        return output

    def run(self, launch: Launch, tensorboard: Path) -> Run:
        """Run to the end, whatever that is."""
        return self._runs([launch], [tensorboard])[0]

    def run_all(self, launches: Mapping[str, Launch], directory: Path) -> dict[str, Run]:
        """Run many at once; each must succeed."""
        runs = self._runs(list(launches.values()), [directory / name for name in launches])
        return {name: succeed(run, name) for name, run in zip(launches, runs, strict=True)}

    def _runs(self, launches: Sequence[Launch], directories: Sequence[Path]) -> list[Run]:
        """Runs with what each logged to its TensorBoard directory."""
        logged = [
            replace(launch, arguments=(*launch.arguments, "--tensorboard-dir", directory))
            for launch, directory in zip(launches, directories, strict=True)
        ]
        return [
            Run(code, output, read_scalars(directory) if directory.is_dir() else {})
            for (code, output), directory in zip(self.results(logged), directories, strict=True)
        ]

    def close(self) -> None:
        """End the process."""
        self.process.communicate("")


@dataclass
class _Running:
    """A run whose ranks are forks of this process."""

    index: int
    store: Any  # torchrun's: its port was free when it was bound, so no two runs race for one
    output: Any
    ranks: set[int] = field(default_factory=set)
    code: int = 0

    def ended(self, pid: int, status: int) -> None:
        """Take a rank off; one that fails takes its peers along."""
        self.ranks.remove(pid)
        if status and not self.code:
            self.code = os.waitstatus_to_exitcode(status)
            for peer in self.ranks:
                os.kill(peer, signal.SIGKILL)


def run_here(command: list[str]) -> int:
    """Run a script in this process; its exit code."""
    sys.argv = command
    code = 0
    try:
        runpy.run_path(command[0], run_name="__main__")
    except SystemExit as leaving:
        code = leaving.code if isinstance(leaving.code, int) else int(leaving.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    return code


def start(index: int, command: list[str], ranks: int) -> _Running:
    """Fork the ranks of a run."""
    from torch.distributed import TCPStore

    store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False) if ranks > 1 else None
    output = tempfile.TemporaryFile()  # noqa: SIM115 -- closed when the run is dropped
    running = _Running(index, store, output)
    for rank in range(ranks):
        child = os.fork()
        if child == 0:
            signal.alarm(TIMEOUT)
            os.dup2(running.output.fileno(), 1)
            os.dup2(running.output.fileno(), 2)
            if store is not None:
                os.environ |= {
                    **{name: str(rank) for name in ("RANK", "LOCAL_RANK")},
                    **{name: str(ranks) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE")},
                    **{"MASTER_ADDR": "localhost", "MASTER_PORT": str(store.port)},
                    **{"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"},
                }
            os._exit(run_here(command))
        running.ranks.add(child)
    return running


def run_commands(asked: list[tuple[list[str], int]]) -> list[tuple[int, str]]:
    """Run all, in order, and as many ranks at once as there are cores."""
    waiting = list(enumerate(asked))
    alive: list[_Running] = []
    results: dict[int, tuple[int, str]] = {}
    while waiting or alive:
        busy = sum(len(running.ranks) for running in alive)
        if waiting and (not alive or busy + waiting[0][1][1] <= CORES):
            index, (command, ranks) = waiting.pop(0)
            alive.append(start(index, command, ranks))
            continue
        pid, status = os.wait()
        running = next(running for running in alive if pid in running.ranks)
        running.ended(pid, status)
        if not running.ranks:
            alive.remove(running)
            running.output.seek(0)
            text = running.output.read().decode(errors="replace")
            results[running.index] = running.code, text
    return [results[index] for index in range(len(asked))]


def import_all() -> None:
    """Bring what a run imports into memory; megatron.training brings what the entry point takes from it."""
    from megatron_ext.runtime import cpu

    cpu.enable()
    # But for Megatron's tokenizers, which cost each fork a second.
    import megatron.core.tokenizers.text.libraries
    import megatron.training  # noqa: F401

    import megatron_ext.arguments
    import megatron_ext.data.checks
    import megatron_ext.data.providers
    import megatron_ext.reference
    import megatron_ext.training  # noqa: F401


def main() -> None:
    sys.path.insert(0, str(ROOT))
    with collector.paused():  # and each fork leaves alone what it shares with this process
        import_all()
    # Answers alone go to standard output.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        print(json.dumps(run_commands(json.loads(line))), file=answers, flush=True)


if __name__ == "__main__":
    main()
