"""Building and loading the index of 10 B and 100 B tokens, fitted and extrapolated to 1 T.

    python -m benchmarks.index [--tokens 10e9 100e9] [--shards 100 1000] [--scratch FOLDER] [--out FOLDER]

Data sets are simulated: an `.idx` of documents of log-normal lengths (mean 1,000 tokens, a third of a
page to a book), a manifest, and a `.bin` that is all hole. A run reads 95% of the tokens at sequence 4096,
split 99,1,0, with the shards weighted by their tokens. Ours and Megatron's own dataset and builder index the
same shards in turn, each in a fresh process: first with an empty cache, as rank 0 does, then with the cache,
as every other rank and every later start. Also what the entry point checks of the data before.

Processor seconds of one process (user and system), which hold on a busy machine as well, and wall seconds.
Memory is that of the process itself (anonymous), at its peak and at the end; mapped files, which ranks
share, are not in it. The fit has one constant a shard and one a document, and for the blend one a sample
and one a sample and shard, at each of which Megatron compares all weights. 100 B tokens need 5 GB of disk.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from benchmarks import results_file
from benchmarks.index_report import GOAL, KINDS, draw, fit, table

ROOT = results_file.ROOT
SEQUENCE, READ, SPLIT, VALID = 4096, 0.95, "99,1,0", 10_240
MEAN, SIGMA = 1000, 1.2


def simulate(folder: Path, *, tokens: float, shards: int) -> None:
    """Write the shards; `.bin` takes no room on the disk."""
    from megatron_ext.data.indexed import HEADER, MAGIC, VERSION
    from megatron_ext.data.manifest import Manifest, Source, write_manifest

    folder.mkdir(parents=True)
    mean = np.log(MEAN) - SIGMA**2 / 2
    for shard in tqdm(range(shards), desc="simulating", unit="shard", disable=None):
        random = np.random.default_rng(shard)
        count = round(tokens / shards / MEAN)
        lengths = np.maximum(random.lognormal(mean, SIGMA, count), 1).astype(np.int32)
        ends = np.cumsum(lengths, dtype=np.int64) * 2
        prefix = folder / f"shard_{shard:04d}_text_document"
        with open(f"{prefix}.idx", "wb") as stream:
            stream.write(HEADER.pack(MAGIC, VERSION, 8, count, count + 1))
            for array in (lengths, ends - 2 * lengths, np.arange(count + 1, dtype=np.int64)):
                stream.write(array.tobytes())
        with open(f"{prefix}.bin", "wb") as stream:
            stream.truncate(int(ends[-1]))
        digests = sorted(f"{n:016x}" for n in random.integers(0, 2**63, 1024).tolist())
        manifest = Manifest(
            **dict.fromkeys(("tokenizer_type", "tokenizer_model", "tokenizer_digest"), "x"),
            **{"vocab_size": 64000, "eod_id": 2, "append_eod": True, "dtype": "uint16"},
            **{"documents": count, "sequences": count, "tokens": int(ends[-1]) // 2},
            **{"max_token_id": 63999, "skipped": {}, "backend": "x"},
            sources=[Source(path="x", bytes=1)],
            content_digest=f"{shard:064x}",
            document_sample=digests,
        )
        write_manifest(prefix, manifest)


class Memory:
    """Anonymous memory of this process: at its peak, seen every 20 ms, and now. In MiB."""

    def __init__(self) -> None:
        self.peak, self._ended = 0.0, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    @staticmethod
    def now() -> float:
        with open("/proc/self/status") as status:
            return int(status.read().partition("RssAnon:")[2].split()[0]) / 1024

    def _watch(self) -> None:
        while not self._ended.wait(0.02):
            self.peak = max(self.peak, self.now())

    def end(self) -> float:
        self._ended.set()
        self._thread.join()
        return max(self.peak, self.now())


class Clock:
    """Wall and processor seconds of what runs inside, added up."""

    def __init__(self) -> None:
        self.wall = self.processor = 0.0

    def __enter__(self) -> None:
        self._start = time.perf_counter(), time.process_time()

    def __exit__(self, *_: object) -> None:
        self.wall += time.perf_counter() - self._start[0]
        self.processor += time.process_time() - self._start[1]


class Tokenizer:
    """As much of one as a dataset asks for."""

    vocab_size, eod, pad, eos = 64000, 2, 1, 2
    unique_identifiers = {"class": "none"}  # noqa: RUF012


def index(kind: str, folder: Path, cache: Path) -> dict[str, float]:
    """Build or load the index; runs in a process of its own."""
    from megatron.core.datasets import blended_dataset, gpt_dataset
    from megatron.core.datasets import blended_megatron_dataset_builder as stock

    from megatron_ext.data.index_cache import DatasetBuilder
    from megatron_ext.data.sourced import SourcedGPTDataset

    prefixes = [str(path.with_suffix("")) for path in sorted(folder.glob("*.idx"))]
    tokens = [Path(f"{prefix}.bin").stat().st_size / 2 for prefix in prefixes]
    config = gpt_dataset.GPTDatasetConfig(
        **{"random_seed": 1, "sequence_length": SEQUENCE, "blend": (prefixes, tokens)},
        **{"split": SPLIT, "path_to_cache": str(cache), "tokenizer": Tokenizer()},
        **{"reset_position_ids": False, "reset_attention_mask": False, "eod_mask_loss": False},
        **{"create_attention_mask": False, "mid_level_dataset_surplus": 0.005},
    )
    ours = kind == "ours"
    of = SourcedGPTDataset if ours else gpt_dataset.GPTDataset
    builder = DatasetBuilder if ours else stock.BlendedMegatronDatasetBuilder
    blending, whole = Clock(), Clock()
    build_indices = blended_dataset.BlendedDataset._build_indices

    def timed(self):
        with blending:
            return build_indices(self)

    blended_dataset.BlendedDataset._build_indices = timed
    samples = int(READ * sum(tokens) / SEQUENCE)
    before, memory = Memory.now(), Memory()
    with whole:
        train = builder(of, [samples, VALID, 0], lambda: True, config).build()[0]
    peak, held = memory.end() - before, Memory.now() - before
    assert len(train) >= samples
    return {
        "wall_s": whole.wall,
        "processor_s": whole.processor,
        "blending_wall_s": blending.wall,
        "blending_processor_s": blending.processor,
        "peak_mib": peak,
        "held_mib": held,
        "samples": samples,
    }


def checks(folder: Path) -> dict[str, dict[str, float]]:
    """Seconds of the entry point's checks of the data; every tenth shard is forgotten, the rest replayed."""
    from megatron_ext.data.manifest import check_prefix
    from megatron_ext.data.overlap import find_shared
    from megatron_ext.data.sourced import content_key

    prefixes = [str(path.with_suffix("")) for path in sorted(folder.glob("*.idx"))]
    forgotten, replayed = prefixes[::10], [p for i, p in enumerate(prefixes) if i % 10]
    steps = {
        "files and manifests": lambda: [check_prefix(p, vocab_size=64000) for p in prefixes],
        "content keys": lambda: [content_key(p) for p in prefixes],
        "overlap": lambda: find_shared(forgotten, replayed),
    }
    seconds = {}
    for name, step in steps.items():
        with (clock := Clock()):
            step()
        seconds[name] = {"wall_s": clock.wall, "processor_s": clock.processor}
    return seconds


def child(*words: object) -> dict[str, Any]:
    """Run one measurement in a fresh process."""
    command = [sys.executable, "-m", "benchmarks.index", "--child", *map(str, words)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def measure(scratch: Path, *, tokens: float, shards: int) -> dict[str, Any]:
    """All numbers of one size; its files are removed."""
    folder = scratch / "shards"
    simulate(folder, tokens=tokens, shards=shards)
    case: dict[str, Any] = {"tokens": tokens, "shards": shards}
    case["documents"] = sum((file.stat().st_size - 42) // 20 for file in folder.glob("*.idx"))
    case["checks"] = child("checks", folder)
    for kind in KINDS:
        cache = scratch / "cache"
        found = {"build": child("index", kind, folder, cache)}
        found["load"] = child("index", kind, folder, cache)
        files = list(cache.iterdir())
        found["cache_mb"] = sum(file.stat().st_size for file in files) / 1e6
        found["cache_files"] = len(files)
        case[kind] = found
        case["samples"] = found["build"]["samples"]
        shutil.rmtree(cache)
    shutil.rmtree(folder)
    return case


def main() -> None:
    """Measure, fit, print and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tokens", type=float, nargs="+", default=[10e9, 100e9])
    parser.add_argument("--shards", type=int, nargs="+", default=[100, 1000])
    parser.add_argument("--scratch", type=Path, help="folder for shards and caches")
    parser.add_argument("--out", type=Path, default=results_file.RESULTS)
    options = parser.parse_args()
    load = os.getloadavg()[0]
    cases = []
    for tokens in options.tokens:
        for shards in options.shards:
            with tempfile.TemporaryDirectory(dir=options.scratch) as scratch:
                cases.append(measure(Path(scratch), tokens=tokens, shards=shards))
            print(json.dumps(cases[-1]), flush=True)
    fits = {kind: fit(cases, kind) for kind in KINDS}
    print(f"\n{table(cases, fits)}\n")
    for case in cases:
        parts = ", ".join(f"{k} {v['processor_s']:.2f} s" for k, v in case["checks"].items())
        print(f"checks at {case['shards']} shards, {case['tokens']:.0e} tokens: {parts}")
    loads = {"load_average_before": load, "load_average_after": os.getloadavg()[0]}
    environment = results_file.environment(
        "index", "cpu", **{name: round(value, 1) for name, value in loads.items()}
    )
    setting = {"sequence": SEQUENCE, "read": READ, "split": SPLIT, "validation": VALID}
    setting |= {"mean_document": MEAN, "sigma": SIGMA, "goal": GOAL}
    path = results_file.write(options.out, "index", environment, cases, setting=setting, fits=fits)
    draw(cases, fits, path.with_suffix(".png"))
    print(f"\nwritten to {path}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        what, *words = sys.argv[2:]
        with contextlib.redirect_stdout(sys.stderr):
            numbers = checks(Path(words[0])) if what == "checks" else None
            numbers = numbers or index(words[0], Path(words[1]), Path(words[2]))
        print(json.dumps(numbers))
    else:
        main()
