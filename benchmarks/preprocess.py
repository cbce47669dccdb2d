"""Throughput of tools/preprocess_data.py against Megatron-LM's tool of the same name.

    python -m benchmarks.preprocess --peer-path ~/Megatron-LM
    python -m benchmarks.preprocess --input corpus.jsonl --tokenizer-model tokenizer.model --workers 2

Without `--input` the text is that of the installed Python and its packages (source and documentation,
250 MB where there is as much), and the tokenizer is trained on its beginning. All tools get the same JSON
lines, SentencePiece model and number of workers, in turn, `--repeats` times; the outputs must be the
same bytes. Wall time is that of the whole process, start and imports included, so the input should be
large; processor time (user and system, workers included) is reported beside it, because it holds on a
busy machine as well. Megatron-LM's tool is not on PyPI: without a checkout at `--peer-path` it is
reported as not available. Writes `preprocess-cpu.json`.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path

from benchmarks import results_file

ROOT = results_file.ROOT
TEXT_SUFFIXES = {".py", ".pyi", ".md", ".rst", ".txt", ".h", ".hpp", ".cuh"}


def make_corpus(path, *, megabytes):
    """Write text files of the installed Python and its packages as JSON lines."""
    folders = [Path(sysconfig.get_paths()[name]) for name in ("stdlib", "purelib")]
    # Below stdlib lies purelib, unless this is a virtual environment: every file once.
    files = sorted({file for folder in folders for file in folder.rglob("*")})
    left = megabytes * 1e6
    with path.open("w") as sink:
        for file in files:
            if file.suffix not in TEXT_SUFFIXES or not file.is_file():
                continue
            text = file.read_text(errors="ignore")
            if text.strip() and left > 0:
                sink.write(json.dumps({"text": text}) + "\n")
                left -= len(text)


def train_tokenizer(corpus, model):
    """Train 16,000 pieces on the first 8 MB."""
    with corpus.open() as lines:
        head = lines.readlines(8_000_000)
    beginning = corpus.with_name("beginning.jsonl")
    beginning.write_text("".join(head))
    tool = [sys.executable, ROOT / "tools" / "train_tokenizer.py", "--input", beginning]
    measure([*tool, "--vocab-size", 16000, "--output", model, "--overwrite"], {}, ROOT)


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


def run(args, scratch):
    if args.input is None:
        args.input = scratch / "corpus.jsonl"
        make_corpus(args.input, megabytes=args.megabytes)
    if args.tokenizer_model is None:
        args.tokenizer_model = scratch / "tokenizer.model"
        train_tokenizer(args.input, args.tokenizer_model)
    found, missing = candidates(args)
    size = sum(len(json.loads(line)["text"].encode()) for line in args.input.open("rb"))
    seconds = {name: [] for name in found}
    load = os.getloadavg()[0]  # above 0.5 the wall times are not those of an idle machine
    for repeat in range(args.repeats):
        for i, (name, (command, environment, cwd)) in enumerate(found.items()):
            output = ["--output-prefix", scratch / str(i)]
            seconds[name].append(measure([sys.executable, *command, *output], environment, cwd))
            wall, cpu = seconds[name][-1]
            print(
                f"run {repeat + 1} {name:<28} {wall:7.1f} s wall {cpu:7.1f} s processor", flush=True
            )
    if not all(same_bytes(scratch / "0", scratch / str(i)) for i in range(1, len(found))):
        raise SystemExit("the outputs differ")
    rows = []
    for name, values in seconds.items():
        wall, cpu = (statistics.median(column) for column in zip(*values, strict=True))
        row = {
            "tool": name,
            "wall_s": [round(value[0], 2) for value in values],
            "processor_s": [round(value[1], 2) for value in values],
            "mb_per_s": round(size / 1e6 / wall, 2),
            "mb_per_processor_s": round(size / 1e6 / cpu, 2),
        }
        rows.append(row)
    if missing:
        rows.append({"tool": "Megatron-LM", "reason": f"not available: {missing}"})
    environment = results_file.environment("preprocess", "cpu", load_average_before=round(load, 1))
    return {
        "environment": environment,
        "text_mb": round(size / 1e6, 1),
        "workers": args.workers,
        "identical_outputs": True,
        "rows": rows,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--input", type=Path, help="JSON lines")
    parser.add_argument("--megabytes", type=int, default=250, help="of text without --input")
    parser.add_argument("--tokenizer-model", type=Path)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--peer-path", type=Path, help="a checkout of Megatron-LM")
    parser.add_argument("--scratch", type=Path, help="folder for the outputs")
    parser.add_argument("--out", type=Path, default=results_file.RESULTS)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.scratch) as scratch:
        result = run(args, Path(scratch))
    print(f"\n{'tool':<28}{'MB/s':>10}{'MB per processor s':>22}")
    for row in result["rows"]:
        if "reason" in row:
            print(f"{row['tool']:<28}{row['reason']}")
        else:
            print(f"{row['tool']:<28}{row['mb_per_s']:>10}{row['mb_per_processor_s']:>22}")
    path = results_file.write(args.out, "preprocess", **result)
    print(f"\nwritten to {path}")


if __name__ == "__main__":
    main()
