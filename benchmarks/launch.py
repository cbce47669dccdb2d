"""From launch to the end of the first step: the entry point against Megatron's stock loop.

    python -m benchmarks.launch [--repeats 5] [--out FOLDER]

Both are started as a user starts them, in turn, on the same tiny model and data set, whose index is cached
before; the clock stops when the console shows the first iteration. An unlearning start, which loads a
checkpoint and a reference beside, is given for comparison. Wall time and processor time (user and system,
all threads) of the same starts; the ratios are medians over the pairs. Writes `launch-<machine>.json`.
"""

from __future__ import annotations

import argparse
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
from tqdm import tqdm

from benchmarks import results_file
from tests.helpers.entry import ENTRY, ROOT
from tests.helpers.tiny import build

STOCK = ROOT / "tests" / "helpers" / "stock_megatron.py"
FIRST = re.compile(r" iteration +1/")
PLAIN, MEGATRON, UNLEARN = "ours, plain", "Megatron-Core, stock loop", "ours, unlearning"


def start(script: Path, flags: tuple[object, ...]) -> tuple[float, float]:
    """Wall and processor seconds until the first iteration is printed."""
    command = [sys.executable, "-u", str(script), *map(str, flags)]
    began = time.perf_counter()
    process = subprocess.Popen(
        command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        lines.append(line)
        if FIRST.search(line):
            wall = time.perf_counter() - began
            used = psutil.Process(process.pid).cpu_times()
            process.stdout.read()
            process.wait()
            return wall, used.user + used.system
    raise SystemExit("".join(lines[-15:]) + f"\n{script.name} ended before its first iteration")


def measure(repeats: int) -> dict[str, list[tuple[float, float]]]:
    """Seconds of every start, one of each kind in turn."""
    with tempfile.TemporaryDirectory() as folder:
        tiny = build(Path(folder))
        steps = ("--train-iters", 1, "--eval-iters", 1)  # the stock loop wants validation data
        kinds = {
            PLAIN: (ENTRY, tiny.plain(*steps)),
            MEGATRON: (STOCK, tiny.plain(*steps)),
            UNLEARN: (ENTRY, tiny.unlearn(*steps)),
        }
        for script, flags in kinds.values():
            start(script, flags)  # indexes the data, fills the disk cache
        seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in kinds}
        for _ in tqdm(range(repeats), unit="round"):
            for name, (script, flags) in kinds.items():
                seconds[name].append(start(script, flags))
    return seconds


def summary(seconds: dict[str, list[tuple[float, float]]]) -> dict[str, dict[str, object]]:
    """Of each kind: seconds, and medians of the ratios to the stock loop's start of the same round."""
    rows: dict[str, dict[str, object]] = {}
    for name, values in seconds.items():
        row: dict[str, object] = {}
        for i, clock in enumerate(("wall", "processor")):
            ratios = [v[i] / s[i] for v, s in zip(values, seconds[MEGATRON], strict=True)]
            row[f"{clock}_s"] = [round(v[i], 2) for v in values]
            row[f"{clock}_of_stock"] = round(statistics.median(ratios), 3)
        rows[name] = row
    return rows


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, default=results_file.RESULTS)
    options = parser.parse_args()
    load = os.getloadavg()[0]
    rows = summary(measure(options.repeats))
    print(f"\n{'start':28}{'wall s':>10}{'of stock':>10}{'processor s':>14}{'of stock':>10}")
    for name, row in rows.items():
        wall, used = (statistics.median(row[f"{c}_s"]) for c in ("wall", "processor"))  # type: ignore[type-var]
        print(
            f"{name:28}{wall:10.2f}{row['wall_of_stock']:10}{used:14.2f}{row['processor_of_stock']:10}"
        )
    # Only now: a GPU may be for one process at a time, and the starts were others.
    environment = results_file.environment("launch", load_average_before=round(load, 1))
    named = [{"start": name} | row for name, row in rows.items()]
    path = results_file.write(options.out, "launch", environment, named)
    print(f"\nwritten to {path}")


if __name__ == "__main__":
    main()
