"""Runs the real entry point as a user does, and reads what it logged.

Losses are read from TensorBoard's event files, which hold full fp32 values; the console rounds to seven
digits and averages the first two steps after a start.
"""

import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from megatron_ext.analysis.scalars import read_scalars

ROOT = Path(__file__).resolve().parents[2]
ENTRY = ROOT / "pretrain_unlearn.py"
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
# pytest-xdist runs tests in several processes, which share the cores.
CORES = max(1, CORES // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")))

# Of unlearning, in training; validation has the same with " validation" behind them.
LOSSES = ("unlearn loss", "forget loss", "replay loss", "mitigation kl")
METRICS = (*LOSSES, "forget token probability", "replay perplexity")


@dataclass(frozen=True)
class Launch:
    """A run to be started.

    Attributes:
        arguments: command line of the entry point.
        ranks: processes.
        script: what is run instead of the entry point.
    """

    arguments: Sequence[object]
    ranks: int = 1
    script: Path = ENTRY


@dataclass(frozen=True)
class Run:
    """A finished run.

    Attributes:
        returncode: exit code of the launcher.
        output: standard output and error together.
        scalars: by TensorBoard tag and step.
    """

    returncode: int
    output: str = field(repr=False)
    scalars: Mapping[str, Mapping[int, float]] = field(repr=False)

    def line(self, start: str) -> str:
        """The only line of the output that starts so; every rank may print it, but the same."""
        lines = {line for line in self.output.splitlines() if line.startswith(start)}
        assert len(lines) == 1, f"expected one line {start!r}, found {sorted(lines)}"
        return lines.pop()

    def digest(self) -> str:
        """Digest of the reference's weights; under torchrun the end of the line may come later."""
        (digest,) = set(re.findall(r"reference: \S+ digest ([0-9a-f]{16})", self.output))
        return digest

    def series(self, tag: str) -> list[float]:
        """The values of a tag in the order of the steps."""
        return [value for _, value in sorted(self.scalars[tag].items())]


def run(launch: Launch, tensorboard: Path, *, timeout: float = 300.0) -> Run:
    """Run to the end, whatever that is."""
    command = [sys.executable]
    # One thread a rank: the models are tiny, and threads that wait for a busy core take 10 ms a product.
    environment = dict(os.environ, OMP_NUM_THREADS="1")
    if launch.ranks > 1:
        # c10d on port 0: the launcher picks a free port by itself, so no two runs race for one.
        command += ["-m", "torch.distributed.run", "--rdzv-backend", "c10d"]
        command += ["--rdzv-endpoint", "localhost:0", "--nproc-per-node", str(launch.ranks)]
    command += [str(launch.script), *map(str, launch.arguments)]
    result = subprocess.run(
        [*command, "--tensorboard-dir", str(tensorboard)],
        cwd=ROOT,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=timeout,
    )
    scalars = read_scalars(tensorboard) if tensorboard.is_dir() else {}
    return Run(result.returncode, result.stdout, scalars)


def run_all(launches: Mapping[str, Launch], directory: Path) -> dict[str, Run]:
    """Run many at once, with no more ranks than cores; each must succeed."""
    slots = _Slots(CORES)

    def start(name: str) -> Run:
        with slots.taken(launches[name].ranks):
            return succeed(run(launches[name], directory / name), name)

    with ThreadPoolExecutor(max_workers=CORES) as pool:
        return dict(zip(launches, pool.map(start, launches), strict=True))


def succeed(result: Run, name: str = "") -> Run:
    """The run itself; an error with the first traceback in its output if it failed."""
    # What ranks print afterwards is that they lost each other; the cause comes first.
    start = max(0, result.output.find("Traceback"))
    end = result.output[start:][:6000] if start else result.output[-6000:]
    assert result.returncode == 0, f"{name}: exit code {result.returncode}\n{end}"
    # Of a library's warnings those that nobody can act on are hidden, and none other is expected.
    warned = re.search(r".*\w+Warning: .*", result.output)
    assert warned is None, f"{name}: {warned and warned[0]}"
    return result


class _Slots:
    """Counts ranks, so that a run of many waits for the cores and then has them all."""

    def __init__(self, total: int) -> None:
        self.total = total
        self.free = total
        self.changed = threading.Condition()

    @contextmanager
    def taken(self, ranks: int) -> Iterator[None]:
        count = min(ranks, self.total)
        with self.changed:
            self.changed.wait_for(lambda: self.free >= count)
            self.free -= count
        try:
            yield
        finally:
            with self.changed:
                self.free += count
                self.changed.notify_all()
