"""Time, memory and MFU of a whole training step: stock Megatron, our layers, our head, unlearning.

    python -m benchmarks.step [--device cuda|cpu] [--out DIR]

On a GPU the model is the 2B one of arXiv 2406.12397 (hidden 2048, 32 layers, sequence 4096, bf16);
on a CPU a small one at sequence 1024. A step is forward, backward, gradient norm, clip and Adam.
Variants that need each other's ratio take turns, a step each, so that a drift of the machine hits
them alike. Prints a table, writes step-<device>.json and step-<device>.png.
"""

import argparse
import gc
import json
import logging
import os
import platform
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from megatron_ext.runtime import cpu

cpu.enable()  # before megatron is imported

PEAK_FLOPS = 989e12  # dense bf16 of an H100 or H200 SXM, by the vendor's datasheet
MFU_NOTE = "6 FLOPs a matmul parameter and token; attention causal (masked half left out) or full"


def _groups() -> Iterable[tuple[str, list[Any]]]:
    """Variants by group; the first of a group is what the others are compared with."""
    from benchmarks.step_models import Variant

    if not torch.cuda.is_available():
        return [
            (
                "plain step",
                [
                    Variant("stock layers, stock head", native=False),
                    Variant("our layers, stock optimizer", native=True, accelerated=False),
                    Variant("our layers and optimizer", native=True),
                    Variant("our layers, optimizer and head", native=True, fused_head=True),
                ],
            ),
            (
                "unlearning, half forget, half replay",
                [
                    Variant("plain", native=True, fused_head=True),
                    Variant("unlearn", native=True, fused_head=True, unlearn=True),
                ],
            ),
        ]
    full = {"native": True, "fused_head": True}
    return [
        ("plain step, stock", [Variant("stock layers, stock head", native=False)]),
        (
            "plain step, 8 of 32 layers",
            [
                Variant("stock layers, stock head, 8 layers", native=False, layers=8),
                Variant("our layers, stock head, 8 layers", native=True, layers=8),
            ],
        ),
        ("stock optimizer", [Variant("our layers", native=True, accelerated=False)]),
        ("our optimizer", [Variant("our layers and optimizer", native=True)]),
        ("micro-batch 1", [Variant("all ours", **full)]),
        (
            "unlearning, half forget, half replay",
            [
                Variant("all ours, micro-batch 2", micro_batch=2, **full),
                Variant("unlearn, micro-batch 2", micro_batch=2, unlearn=True, **full),
            ],
        ),
        ("micro-batch 4", [Variant("all ours, micro-batch 4", micro_batch=4, **full)]),
        (
            "distributed optimizer",
            [
                Variant(
                    "all ours, micro-batch 4, distributed optimizer",
                    micro_batch=4,
                    distributed_optimizer=True,
                    **full,
                )
            ],
        ),
    ]


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _timed(step: Callable[[], float]) -> float:
    _synchronize()
    start = time.perf_counter()
    step()
    _synchronize()
    return time.perf_counter() - start


def _row(group: str, trainer: Any, seconds: list[float], loss: float) -> dict[str, Any]:
    shape, variant = trainer.shape, trainer.variant
    median = statistics.median(seconds)
    layers = variant.layers or shape.layers
    row: dict[str, Any] = {
        "group": group,
        "variant": variant.name,
        "seconds": median,
        "spread": (max(seconds) - min(seconds)) / median,
        "tokens_per_second": shape.tokens / median,
        "first_loss": loss,
    }
    if torch.cuda.is_available():
        row["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
        if not variant.unlearn:
            rate = row["tokens_per_second"] / PEAK_FLOPS
            row["mfu_causal"] = rate * shape.flops_per_token(layers, causal=True)
            row["mfu_full"] = rate * shape.flops_per_token(layers, causal=False)
    return row


def _measure(
    group: str, shape: Any, variants: list[Any], *, warmup: int, repeats: int
) -> list[dict[str, Any]]:
    """Rows of one group; a variant that cannot run gives a row that says why."""
    from benchmarks.step_models import Trainer

    rows: list[dict[str, Any]] = []
    trainers: list[Any] = []
    losses: list[float] = []
    for variant in variants:
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        try:
            trainer = Trainer(shape, variant)
            losses.append(trainer.step())
            trainers.append(trainer)
        except Exception as error:  # one peer that cannot run must not take the others' rows
            reason = f"{type(error).__name__}: {str(error).splitlines()[0]}"
            if not isinstance(error, torch.OutOfMemoryError):
                traceback.print_exc()
            rows.append({"group": group, "variant": variant.name, "failed": reason})
    for _ in range(warmup - 1):
        for trainer in trainers:
            trainer.step()
    seconds: list[list[float]] = [[] for _ in trainers]
    for repeat in range(repeats):
        order = list(range(len(trainers)))
        for index in order if repeat % 2 == 0 else reversed(order):
            seconds[index].append(_timed(trainers[index].step))
    measured = zip(trainers, seconds, losses, strict=True)
    rows += [_row(group, *values) for values in measured]
    comparable = len(variants) > 1 and bool(trainers) and trainers[0].variant is variants[0]
    for row, times in zip([row for row in rows if "seconds" in row], seconds, strict=True):
        if comparable:  # of the steps next to each other, so that slow drift cancels
            pairs = [a / b for a, b in zip(times, seconds[0], strict=True)]
            row["time_of_first"] = statistics.median(pairs)
    return rows


def _profile(shape: Any, variant: Any, path: Path) -> None:
    """Write the most expensive kernels of one step."""
    from torch.profiler import ProfilerActivity, profile

    from benchmarks.step_models import Trainer

    trainer = Trainer(shape, variant)
    trainer.step()
    kind = ProfilerActivity.CUDA if torch.cuda.is_available() else ProfilerActivity.CPU
    with profile(activities=[kind]) as profiler:
        trainer.step()
        _synchronize()
    key = "self_device_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
    table = profiler.key_averages().table(sort_by=key, row_limit=45, max_name_column_width=110)
    path.write_text(f"{variant.name}\n{table}\n")


def _table(rows: list[dict[str, Any]]) -> str:
    lines = [
        f"{'variant':<50} {'s/step':>8} {'tok/s':>9} {'MFU causal':>10} {'full':>6} {'GiB':>6}"
        f" {'of first':>8} {'speed':>7}"
    ]
    for row in rows:
        if "failed" in row:
            lines.append(f"{row['variant']:<50} {row['failed'][:90]}")
            continue
        mfu = [f"{row[k]:.3f}" if k in row else "-" for k in ("mfu_causal", "mfu_full")]
        peak = f"{row['peak_gib']:.1f}" if "peak_gib" in row else "-"
        ratio = row.get("time_of_first")
        comparison = f"{ratio:>9.3f} {1 / ratio:>6.3f}x" if ratio else ""
        lines.append(
            f"{row['variant']:<50} {row['seconds']:>8.3f} {row['tokens_per_second']:>9.0f} "
            f"{mfu[0]:>10} {mfu[1]:>6} {peak:>6}{comparison}"
        )
    return "\n".join(lines)


def _plot(rows: list[dict[str, Any]], title: str, path: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    shown = [row for row in rows if "seconds" in row]
    figure, axis = plt.subplots(figsize=(9, 0.45 * len(shown) + 1.2))
    axis.barh([row["variant"] for row in shown], [row["seconds"] for row in shown])
    axis.invert_yaxis()
    axis.set_xlabel("seconds a step (median)")
    axis.set_title(title)
    figure.savefig(path, dpi=120, bbox_inches="tight")


def _start_megatron(device: str) -> None:
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    torch.distributed.init_process_group(
        "nccl" if device == "cuda" else "gloo",
        store=torch.distributed.HashStore(),
        rank=0,
        world_size=1,
    )
    parallel_state.initialize_model_parallel()
    model_parallel_cuda_manual_seed(1)
    logging.getLogger("megatron").setLevel(logging.ERROR)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=("cuda", "cpu"), default=default)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--only", default="", help="only groups whose name contains this")
    parser.add_argument("--repeats", type=int, help="timed steps a variant (GPU 4, CPU 15)")
    parser.add_argument("--profile", action="store_true", help="also write a kernel profile")
    args = parser.parse_args(argv)
    if args.device != default:
        parser.error(f"--device {args.device}: this machine has {default}; hide it to choose")
    _start_megatron(args.device)
    from benchmarks.step_models import PAPER_2B, SMALL

    shape = PAPER_2B if args.device == "cuda" else SMALL
    repeats = args.repeats or (4 if args.device == "cuda" else 15)
    args.out.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    for group, variants in _groups():
        if args.only not in group:
            continue
        start = time.perf_counter()
        torch._dynamo.reset()  # or another micro-batch size would meet kernels for dynamic shapes
        rows += _measure(group, shape, variants, warmup=2, repeats=repeats)
        gc.collect()
        torch.cuda.empty_cache()
        print(f"# {group}: {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
    name = torch.cuda.get_device_name() if args.device == "cuda" else f"{os.cpu_count()}-core CPU"
    report = {
        "device": name,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "megatron-core": version("megatron-core"),
        },
        "command": "python -m benchmarks.step " + " ".join(argv or sys.argv[1:]),
        "threads": torch.get_num_threads(),
        "shape": {k: str(v) for k, v in vars(shape).items()},
        "conventions": f"{MFU_NOTE}; peak {PEAK_FLOPS / 1e12:.0f} TFLOP/s",
        "rows": rows,
    }
    (args.out / f"step-{args.device}.json").write_text(json.dumps(report, indent=1) + "\n")
    _plot(rows, f"training step, {shape.name}, {name}", args.out / f"step-{args.device}.png")
    print(_table(rows))
    if args.profile:
        variants = [v for _, vs in _groups() for v in vs if v.native and not v.unlearn]
        _profile(shape, variants[-1], args.out / f"step-{args.device}-profile.txt")


if __name__ == "__main__":
    main()
