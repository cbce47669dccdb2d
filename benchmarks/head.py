"""Time and memory of the unlearning head, forward and backward, against its peers in one run.

    python -m benchmarks.head [--device cuda|cpu] [--out FOLDER]
    python -m benchmarks.head --size 8192 4096 128256 --peers ours naive     # a shape of your own

Prints a table, writes `head-<machine>.json` and `head-<machine>.png`, for shapes of your own with the first
of them in the name. A peer that cannot run is listed with the reason. On a GPU: median of CUDA events, and
the allocator's peak above the inputs.
On a CPU: each measurement in a process of its own, its peak of resident memory above the inputs.
"""

import argparse
import gc
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import results_file
from benchmarks.peers import PEERS, REFERENCES, Workload, make_workload

# (tokens, hidden, vocabulary); the first is the one that the targets are stated for.
SIZES = {
    "cuda": ((8192, 2048, 131072), (2048, 2048, 32768), (4096, 2048, 65536)),
    "cpu": ((2048, 512, 32768), (1024, 256, 16384), (512, 256, 8192)),
}
REPEATS = {"cuda": 8, "cpu": 5}
DTYPES = {"cuda": torch.bfloat16, "cpu": torch.float32}
# Cycles, some 5 ms: the GPU sleeps until what is measured is launched, since in training the host is ahead.
AHEAD = 10_000_000
MIB = 2**20


def step(loss: Callable[[Workload], torch.Tensor], w: Workload) -> float:
    """One forward and backward; returns the loss."""
    w.hidden.grad = w.weight.grad = None
    value = loss(w)
    value.backward()
    return value.item()


def measure_cuda(loss: Callable[[Workload], torch.Tensor], w: Workload) -> dict[str, float]:
    """Milliseconds (median) and peak MiB above the inputs."""
    value = step(loss, w)  # compiles and tunes
    step(loss, w)
    times = []
    for _ in range(REPEATS["cuda"]):
        w.hidden.grad = w.weight.grad = None
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(AHEAD)
        start.record()
        loss(w).backward()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    w.hidden.grad = w.weight.grad = None
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step(loss, w)
    peak = torch.cuda.max_memory_allocated() - before
    return {"ms": sorted(times)[len(times) // 2], "mib": peak / MIB, "loss": value}


def measure_cpu(loss: Callable[[Workload], torch.Tensor], w: Workload) -> dict[str, float]:
    """As on a GPU; resident memory, so that the allocator's habits count as well."""
    warm = make_workload(16, 32, 64, reference="half", dtype=torch.float32, device="cpu")
    step(loss, warm)
    gc.collect()
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the high-water mark starts again from here
    before = _status("VmRSS")
    value = step(loss, w)
    peak = _status("VmHWM") - before
    times = []
    for _ in range(REPEATS["cpu"]):
        start = time.perf_counter()
        step(loss, w)
        times.append((time.perf_counter() - start) * 1e3)
    return {"ms": sorted(times)[len(times) // 2], "mib": peak / 1024, "loss": value}


def _status(field: str) -> int:
    """KiB, from the kernel's account of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1])
    raise RuntimeError(f"/proc/self/status has no {field}")


def measure(device: str, peer: str, size: tuple[int, int, int], reference: str) -> dict[str, Any]:
    """One cell of the table: numbers, or why there are none."""
    row: dict[str, Any] = {"peer": peer, "size": list(size), "reference": reference}
    try:
        w = make_workload(*size, reference=reference, dtype=DTYPES[device], device=device)
        loss = PEERS[peer]()
        row |= (measure_cuda if device == "cuda" else measure_cpu)(loss, w)
    except Exception as error:  # a peer's failure is a result: whatever it is, it is reported
        row["reason"] = (
            f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        )
    return row


def measure_all(
    device: str, seconds: float, sizes: Sequence[tuple[int, int, int]], peers: Iterable[str]
) -> list[dict[str, Any]]:
    """Every peer at every size, in this order, until the time is up."""
    started, rows = time.monotonic(), []
    for size in sizes:
        for reference in reversed(REFERENCES):
            for peer in peers:
                if device == "cpu" and peer in ("ours-halves", "ours-lean", "ours-candidate"):
                    continue  # theirs is a GPU
                if time.monotonic() - started > seconds:
                    row = {"peer": peer, "size": list(size), "reference": reference}
                    rows.append(row | {"reason": f"not started: {seconds:.0f} s were up"})
                    continue
                if device == "cpu":
                    rows.append(_in_process(peer, size, reference))
                else:
                    rows.append(measure(device, peer, size, reference))
                    gc.collect()
                    torch.cuda.empty_cache()
                print(_line(rows[-1]), flush=True)
    return rows


def _in_process(peer: str, size: tuple[int, int, int], reference: str) -> dict[str, Any]:
    """Memory and time from a process each: what makes the one exact makes the other slow."""
    cell = json.dumps([peer, list(size), reference])
    # One arena, and large blocks returned at once: what is measured is use, not hoarding.
    exact = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": str(MIB)}
    rows = []
    for settings in (exact, {}):
        command = [sys.executable, "-m", "benchmarks.head", "--device", "cpu", "--cell", cell]
        done = subprocess.run(command, env=os.environ | settings, capture_output=True, text=True)
        if done.returncode:
            row = {"peer": peer, "size": list(size), "reference": reference}
            return row | {"reason": done.stderr.strip().splitlines()[-1]}
        rows.append(json.loads(done.stdout.splitlines()[-1]))
    memory, timed = rows
    return next((row for row in rows if "reason" in row), timed | {"mib": memory.get("mib")})


def _line(row: dict[str, Any]) -> str:
    size = "x".join(map(str, row["size"]))
    head = f"{size:<18} {row['reference']:<5} {row['peer']:<10}"
    if "reason" in row:
        return f"{head} cannot: {row['reason'][:140]}"
    return f"{head} {row['ms']:9.2f} ms {row['mib']:9.0f} MiB   loss {row['loss']:.5f}"


def summary(rows: list[dict[str, Any]]) -> list[str]:
    """Ratios of ours to each peer, a line a size and reference."""
    lines = []
    for ours in (row for row in rows if row["peer"] == "ours" and "ms" in row):
        same = [
            row
            for row in rows
            if row["size"] == ours["size"]
            and row["reference"] == ours["reference"]
            and row is not ours
            and "ms" in row
        ]
        ratios = ", ".join(
            f"{row['peer']} {row['ms'] / ours['ms']:.2f}x time "
            f"{row['mib'] / ours['mib']:.1f}x memory"
            for row in same
        )
        size = "x".join(map(str, ours["size"]))
        lines.append(f"{size:<18} {ours['reference']:<5} against ours: {ratios}")
    return lines


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Bars of time and memory, a panel a size, at the reference on all tokens."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [row for row in rows if "ms" in row and row["reference"] == "all"]
    sizes = sorted({tuple(row["size"]) for row in rows})
    if not sizes:
        return
    figure, axes = pyplot.subplots(2, len(sizes), figsize=(4 * len(sizes), 6), squeeze=False)
    for column, size in enumerate(sizes):
        cells = [r for r in rows if tuple(r["size"]) == size]
        names = [r["peer"] for r in cells]
        for line, (key, unit) in enumerate((("ms", "ms"), ("mib", "peak extra MiB"))):
            axis = axes[line][column]
            colours = ["tab:red" if name == "ours" else "tab:gray" for name in names]
            axis.barh(names, [r[key] for r in cells], color=colours)
            axis.set_xlabel(unit)
            axis.invert_yaxis()
        axes[0][column].set_title("T {} H {} V {}".format(*size), fontsize=9)
    figure.suptitle(
        "Head, forward + backward,\ncross-entropy + KL, reference on all tokens", fontsize=10
    )
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cuda", "cpu"))
    parser.add_argument("--out", type=Path, default=results_file.RESULTS)
    parser.add_argument("--seconds", type=float, default=180, help="start no cell after this long")
    parser.add_argument(
        "--size",
        type=int,
        nargs=3,
        action="append",
        metavar=("TOKENS", "HIDDEN", "VOCABULARY"),
        help="instead of the table's shapes; may be given several times",
    )
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=list(PEERS), metavar="PEER")
    parser.add_argument("--cell", help=argparse.SUPPRESS)
    args = parser.parse_args()
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if args.cell:
        peer, size, reference = json.loads(args.cell)
        print(json.dumps(measure(device, peer, tuple(size), reference)))
        return
    from benchmarks import head_accuracy

    errors = head_accuracy.accuracy(device)
    head_accuracy.show(errors)
    sizes = [tuple(size) for size in args.size or SIZES[device]]
    rows = measure_all(device, args.seconds, sizes, args.peers)
    lines = summary(rows)
    print("\n".join(["", *lines]))
    environment = results_file.environment(
        "head", device, threads=torch.get_num_threads(), dtype=str(DTYPES[device])
    )
    shape = "-{}x{}x{}".format(*sizes[0]) if args.size else ""
    path = results_file.write(
        args.out, "head", environment, rows, shape, summary=lines, errors=errors
    )
    try:
        plot(rows, path.with_suffix(".png"))
    except ImportError as error:
        print(f"no plot: {error}")


if __name__ == "__main__":
    main()
