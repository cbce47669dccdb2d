"""What one GPU can prove, in the order of its worth, within the time that there is.

    make gpu-check [MINUTES=60]
    python -m benchmarks.gpu_check --minutes 9 --only kernels candidate head --out runs/gpu-check

First what must be right (kernels against fp64, the entry point against the CPU), then what must be fast, and
a real unlearning run. Each part is a command of its own, printed as it can be typed. What fails or does not
end in time is reported, and the rest goes on. Output goes to NAME.log, whose end is shown;
`gpu-check-<machine>.json` is written after each part. Exit code 1 unless all that was chosen has passed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks import results_file

ROOT = results_file.ROOT
# Named, so that what other tests import need not be there.
KERNEL_TESTS = (
    *("tests/unit/test_head_triton.py", "tests/unit/test_losses_accuracy.py"),
    *("tests/unit/test_losses_contract.py", "tests/unit/test_model_gpu.py"),
    *("tests/unit/test_offload.py", "tests/unit/test_head_gpu.py"),
)
ENTRY_TESTS = (
    "tests/integration/test_on_gpu.py",
    "tests/integration/test_transformer_engine.py",
)
LEAST = 20.0  # seconds; with less left no part is started
SHARE = "SECONDS"
SHOWN = 25  # lines of a log


@dataclass(frozen=True)
class Part:
    """One command.

    Attributes:
        name: of the log, and for `--only`.
        title: what it shows.
        command: behind the Python that runs this. SHARE in it becomes a share of the time that it has, after
            which a benchmark starts nothing more.
        seconds: in which it must end.
        environment: on top of this process's.
    """

    name: str
    title: str
    command: Sequence[str]
    seconds: float
    environment: dict[str, str] = field(default_factory=dict)

    def words(self, seconds: float) -> list[str]:
        """The command for the time that there is."""
        return [str(int(seconds * 0.6)) if word == SHARE else word for word in self.command]

    def printable(self, seconds: float) -> str:
        """The command as it can be typed in the root of the checkout."""
        variables = [f"{key}={value}" for key, value in self.environment.items()]
        return shlex.join([*variables, "python", *self.words(seconds)])


def parts(out: Path) -> list[Part]:
    """All of them; benchmarks write their tables to `out`."""
    to = ("--out", str(out))
    tests = ("-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", "--durations=5")
    kernels = (*tests, KERNEL_TESTS[0])
    head = ("-m", "benchmarks.head", "--size", "8192", "2048", "131072", "--seconds", SHARE)
    step = ("-m", "benchmarks.step", "--seconds", SHARE)
    candidate = {"HEAD_KERNELS": "benchmarks.candidate"}
    demo = ("examples/demo/run.py", "--preset", "gpu", "--output-dir", str(out / "demo"))
    return [
        Part("kernels", "kernels and layers against fp64", (*tests, *KERNEL_TESTS), 240),
        Part("candidate", "the tuned kernels against fp64", kernels, 120, candidate),
        Part("head", "head against its peers at the paper's size", (*head, *to), 180),
        Part("entry", "entry point against the CPU", (*tests, *ENTRY_TESTS), 300),
        Part("step", "step time and MFU at 2B", (*step, *to), 480),
        Part("unlearn", "the whole method on a model of 100 M parameters", demo, 600),
        Part("tune", "phases of the head", ("-m", "benchmarks.head_phases", "--tune", *to), 300),
        Part("layers", "parts of a layer", ("-m", "benchmarks.layers", *to), 120),
        Part("documents", "attention within documents", ("-m", "benchmarks.documents", *to), 120),
        Part("experts", "a rank's experts", ("-m", "benchmarks.experts", *to), 120),
        Part("launch", "launch to first step", ("-m", "benchmarks.launch", *to), 240),
    ]


def environment() -> dict[str, Any]:
    """The machine and its versions, asked for by another process: a GPU may be for one process at a time."""
    asked = "import json; from benchmarks.results_file import environment; "
    asked += "print(json.dumps(environment('gpu_check', 'cuda')))"
    command = [sys.executable, "-c", asked, *sys.argv[1:]]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def run(part: Part, log: Path, seconds: float) -> dict[str, Any]:
    """Run to its end, or until its time is up; its row of the table."""
    printable = part.printable(seconds)
    print(f"\n== {part.name}: {part.title}\n$ {printable}", flush=True)
    start = time.monotonic()
    with log.open("wb") as sink:
        process = subprocess.Popen(
            [sys.executable, *part.words(seconds)],
            cwd=ROOT,
            env=os.environ | {"PYTHONUNBUFFERED": "1"} | part.environment,
            stdout=sink,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # what it started ends with it
        )
        try:
            code = process.wait(seconds)
            result = "passed" if code == 0 else f"failed with exit code {code}"
        except subprocess.TimeoutExpired:
            result = f"stopped after {seconds:.0f} s"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    took = time.monotonic() - start
    print("\n".join(log.read_text(errors="replace").splitlines()[-SHOWN:]))
    row: dict[str, Any] = {"part": part.name, "title": part.title, "command": printable}
    return row | {"result": result, "seconds": round(took, 1), "log": log.name}


def run_all(chosen: Sequence[Part], out: Path, seconds: float) -> list[dict[str, Any]]:
    """One part after another until the time is up; what was found so far is written after each."""
    end = time.monotonic() + seconds
    rows: list[dict[str, Any]] = []
    machine = environment()
    for part in chosen:
        left = end - time.monotonic()
        if left < LEAST:
            row = {"part": part.name, "title": part.title}
            rows.append(row | {"result": "not started: the time was up", "seconds": 0.0})
        else:
            rows.append(run(part, out / f"{part.name}.log", min(part.seconds, left)))
        results_file.write(out, "gpu_check", machine, rows)
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    names = [part.name for part in parts(Path())]
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float, default=60.0, help="for all parts together")
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="PART")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "gpu-check")
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        parser.error("expected a CUDA device, found none (make test needs no GPU)")
    out = args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    chosen = [part for part in parts(out) if part.name in args.only]
    rows = run_all(chosen, out, 60 * args.minutes)
    print()
    for row in rows:
        print(f"{row['part']:<10} {row['seconds']:>6.0f} s  {row['result']:<28} {row['title']}")
    print(f"\nlogs and tables: {out}")
    return int(any(row["result"] != "passed" for row in rows))


if __name__ == "__main__":
    sys.exit(main())
