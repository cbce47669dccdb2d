"""Throughput of tools/preprocess_data.py against Megatron-LM's tool of the same name.

    python -m benchmarks.preprocess --input corpus.jsonl --tokenizer-model tokenizer.model \
        --workers 2 --peer-path ~/Megatron-LM --out benchmarks/results

Both get the same JSON lines, SentencePiece model and number of workers, in turn, `--repeats` times;
the outputs must be the same bytes. Wall time is that of the whole process, start and imports
included, so the input should be large; processor time (user and system, workers included) is
reported beside it, because it holds on a busy machine as well. Megatron-LM's tool is not on PyPI:
without a checkout at `--peer-path` it is reported as not available.
"""

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def measure(command, environment, cwd):
    """Runs a command; returns its wall and processor seconds."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    start = time.perf_counter()
    done = subprocess.run(
        [str(part) for part in command],
        env=os.environ | environment,
        cwd=cwd,
        capture_output=True,
        text=True,
    )
    wall = time.perf_counter() - start
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        raise SystemExit(f"{command[1]} failed:\n{done.stderr[-2000:]}")
    return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def same_bytes(first, second):
    return all(
        subprocess.run(["cmp", "-s", f"{first}{suffix}", f"{second}{suffix}"]).returncode == 0
        for suffix in ("_text_document.bin", "_text_document.idx")
    )


def candidates(args):
    """Name, command, environment and directory of each tool; a reason in place of a missing peer."""
    common = ["--input", args.input.resolve(), "--append-eod", "--workers", args.workers]
    common += ["--tokenizer-type", "SentencePieceTokenizer"]
    common += ["--tokenizer-model", args.tokenizer_model.resolve()]
    tools = {
        "ours": [ROOT / "tools" / "preprocess_data.py", *common, "--overwrite"],
        "ours, reference tokenizer": [
            *(ROOT / "tools" / "preprocess_data.py", *common),
            *("--overwrite", "--tokenizer-backend", "reference"),
        ],
    }
    found = {name: (command, {}, ROOT) for name, command in tools.items()}
    peer = args.peer_path and args.peer_path.resolve() / "tools" / "preprocess_data.py"
    if peer and peer.is_file():
        root = peer.parents[1]
        found["Megatron-LM"] = ([peer, *common], {"PYTHONPATH": str(root)}, root)
    return found, None if "Megatron-LM" in found else "no checkout at --peer-path"


def run(args):
    found, missing = candidates(args)
    size = sum(len(json.loads(line)["text"].encode()) for line in args.input.open("rb"))
    seconds = {name: [] for name in found}
    load = os.getloadavg()[0]  # above 0.5 the wall times are not those of an idle machine
    with tempfile.TemporaryDirectory(dir=args.scratch) as scratch:
        for repeat in range(args.repeats):
            for i, (name, (command, environment, cwd)) in enumerate(found.items()):
                output = ["--output-prefix", f"{scratch}/{i}"]
                seconds[name].append(measure([sys.executable, *command, *output], environment, cwd))
                wall, cpu = seconds[name][-1]
                print(
                    f"run {repeat + 1} {name:<28} {wall:7.1f} s wall {cpu:7.1f} s processor",
                    flush=True,
                )
        identical = all(same_bytes(f"{scratch}/0", f"{scratch}/{i}") for i in range(1, len(found)))
    if not identical:
        raise SystemExit("the outputs differ")
    rows = {}
    for name, values in seconds.items():
        wall, cpu = (statistics.median(column) for column in zip(*values, strict=True))
        rows[name] = {
            "wall_s": [round(value[0], 2) for value in values],
            "processor_s": [round(value[1], 2) for value in values],
            "mb_per_s": round(size / 1e6 / wall, 2),
            "mb_per_processor_s": round(size / 1e6 / cpu, 2),
        }
    return {
        "machine": f"{os.cpu_count()}-core CPU",
        "load_average_before": round(load, 1),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("gigatoken", "sentencepiece", "numpy")},
        "text_mb": round(size / 1e6, 1),
        "workers": args.workers,
        "identical_outputs": identical,
        "tools": rows | ({"Megatron-LM": f"not available: {missing}"} if missing else {}),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--input", type=Path, required=True, help="JSON lines")
    parser.add_argument("--tokenizer-model", type=Path, required=True)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--peer-path", type=Path, help="a checkout of Megatron-LM")
    parser.add_argument("--scratch", type=Path, help="folder for the outputs")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    args = parser.parse_args()
    result = run(args)
    print(f"\n{'tool':<28}{'MB/s':>10}{'MB per processor s':>22}")
    for name, row in result["tools"].items():
        if isinstance(row, str):
            print(f"{name:<28}{row}")
        else:
            print(f"{name:<28}{row['mb_per_s']:>10}{row['mb_per_processor_s']:>22}")
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / "preprocess-cpu.json"
    path.write_text(json.dumps(result, indent=2) + "\n")
    print(f"\nwritten to {path}")


if __name__ == "__main__":
    main()
