"""Time, memory and MFU of a whole training step: stock Megatron, our layers, our head, unlearning.

    python -m benchmarks.step [--device cuda|cpu] [--out DIR]

On a GPU the model is the 2B one of arXiv 2406.12397 (hidden 2048, 32 layers, sequence 4096, bf16);
on a CPU a small one at sequence 1024. A step is forward, backward, gradient norm, clip and Adam.
Groups run one after the other and give their memory back; the variants of a group take turns, a
step each, so that a drift of the machine hits them alike. Prints a table, writes
`step-<machine>.json` after every group, and `step-<machine>.png`.
"""

import argparse
import gc
import logging
import statistics
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks import results_file
from benchmarks.step_variants import PAPER_2B, SMALL, Group, Shape, Variant, groups
from megatron_ext.runtime import cpu

cpu.enable()  # before megatron is imported

PEAK_FLOPS = 989e12  # dense bf16 of an H100 or H200 SXM, by the vendor's datasheet
MFU_NOTE = "6 FLOPs a matmul parameter and token; attention causal (masked half left out) or full"
WARMUP = 2  # steps: kernels are compiled in the first, moments exist from the second on
GROUP_SECONDS = 45.0  # of timed steps a variant; slower ones get fewer, but at least two
Row = dict[str, Any]


@dataclass
class _Running:
    """A variant whose warm-up went well."""

    trainer: Any
    loss: float
    peak_gib: float
    warm_seconds: float
    seconds: list[float] = field(default_factory=list)


def _say(text: str) -> None:
    print(f"# {time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


def _timed(step: Callable[[], float]) -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    step()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def _collect() -> float:
    """Give unused memory back; returns the GiB that are still allocated."""
    gc.collect()
    if not torch.cuda.is_available():
        return 0.0
    torch.cuda.empty_cache()
    return torch.cuda.memory_allocated() / 2**30


def _start(shape: Shape, variant: Variant, running: list[_Running]) -> _Running:
    """Build a variant, on the model of an earlier one of its group where it can, and warm it up."""
    from benchmarks.step_models import Trainer

    before = _collect()
    shared = [run.trainer for run in running if variant.shares_model(run.trainer.variant)]
    trainer = shared[0].sibling(variant) if shared else Trainer(shape, variant)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    loss = trainer.step()
    for _ in range(WARMUP - 1):
        warm_seconds = _timed(trainer.step)
    peak = torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else 0.0
    others = 0.0 if shared else before  # other models of the group are not this variant's memory
    _say(f"{variant.name}: {warm_seconds:.2f} s a step, peak {peak - others:.1f} GiB")
    return _Running(trainer, loss, peak - others, warm_seconds)


def _failure(group: str, variant: Variant, error: Exception) -> Row:
    reason = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    _say(f"{variant.name}: {reason}")
    if not isinstance(error, torch.OutOfMemoryError):
        traceback.print_exception(error)
    return {"group": group, "variant": variant.name, "failed": reason}


def _take_turns(group: str, running: list[_Running], repeats: int) -> list[Row]:
    """Time the variants, a step each; one that fails gives a row and leaves the others alone."""
    failed: list[Row] = []
    slowest = max((run.warm_seconds for run in running), default=1.0)
    for repeat in range(min(repeats, max(2, int(GROUP_SECONDS / slowest)))):
        for run in running[:] if repeat % 2 == 0 else running[::-1]:
            try:
                run.seconds.append(_timed(run.trainer.step))
            except Exception as error:
                failed.append(_failure(group, run.trainer.variant, error))
                running.remove(run)
    return failed


def _row(group: str, run: _Running) -> Row:
    shape, variant = run.trainer.shape, run.trainer.variant
    median = statistics.median(run.seconds)
    layers = variant.layers or shape.layers
    row: Row = {
        "group": group,
        "variant": variant.name,
        "seconds": median,
        "spread": (max(run.seconds) - min(run.seconds)) / median,
        "steps": len(run.seconds),
        "tokens_per_second": shape.tokens / median,
        "first_loss": run.loss,
    }
    if torch.cuda.is_available():
        row["peak_gib"] = run.peak_gib
        if not variant.unlearn:
            rate = row["tokens_per_second"] / PEAK_FLOPS
            row["mfu_causal"] = rate * shape.flops_per_token(layers, causal=True)
            row["mfu_full"] = rate * shape.flops_per_token(layers, causal=False)
    return row


def _measure(group: str, shape: Shape, variants: list[Variant], repeats: int) -> list[Row]:
    """Rows of one group; a variant that cannot run gives a row that says why."""
    rows: list[Row] = []
    running: list[_Running] = []
    for variant in variants:
        try:
            running.append(_start(shape, variant, running))
        except Exception as error:  # one peer that cannot run must not take the others' rows
            rows.append(_failure(group, variant, error))
        _collect()
    rows += _take_turns(group, running, repeats)
    for run in running:
        row = _row(group, run)
        first = running[0]
        if len(running) > 1 and first.trainer.variant is variants[0]:
            # Of the steps next to each other, so that slow drift cancels.
            pairs = [a / b for a, b in zip(run.seconds, first.seconds, strict=True)]
            row["time_of_first"] = statistics.median(pairs)
        rows.append(row)
    order = [variant.name for variant in variants]
    return sorted(rows, key=lambda row: order.index(row["variant"]))


def _profile(shape: Shape, path: Path) -> None:
    """Write the most expensive kernels of one plain step and of one unlearning step."""
    from torch.profiler import ProfilerActivity, profile

    from benchmarks.step_models import Trainer

    cuda = torch.cuda.is_available()
    group = next(variants for name, variants in groups() if name.startswith("unlearning"))
    trainer = Trainer(shape, group[0])
    tables = []
    for variant in group:
        step = trainer.sibling(variant)
        step.step()
        with profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]) as run:
            _timed(step.step)
        key = "self_device_time_total" if cuda else "self_cpu_time_total"
        table = run.key_averages().table(sort_by=key, row_limit=45, max_name_column_width=110)
        tables.append(f"{variant.name}\n{table}\n")
    path.write_text("\n".join(tables))


def _table(rows: list[Row]) -> str:
    lines = [
        f"{'variant':<44} {'s/step':>8} {'tok/s':>9} {'MFU causal':>10} {'full':>6} {'GiB':>6}"
        f" {'of first':>8} {'speed':>7}"
    ]
    for row in rows:
        if "failed" in row:
            lines.append(f"{row['variant']:<44} {row['failed'][:90]}")
            continue
        mfu = [f"{row[k]:.3f}" if k in row else "-" for k in ("mfu_causal", "mfu_full")]
        peak = f"{row['peak_gib']:.1f}" if "peak_gib" in row else "-"
        ratio = row.get("time_of_first")
        comparison = f"{ratio:>9.3f} {1 / ratio:>6.3f}x" if ratio else ""
        lines.append(
            f"{row['variant']:<44} {row['seconds']:>8.3f} {row['tokens_per_second']:>9.0f} "
            f"{mfu[0]:>10} {mfu[1]:>6} {peak:>6}{comparison}"
        )
    return "\n".join(lines)


def _plot(rows: list[Row], title: str, path: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    shown = [row for row in rows if "seconds" in row]
    figure, axis = plt.subplots(figsize=(9, 0.45 * len(shown) + 1.2))
    names = [f"{row['group']}: {row['variant']}" for row in shown]
    axis.barh(names, [row["seconds"] for row in shown])
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


def _run(
    chosen: list[Group],
    shape: Shape,
    repeats: int,
    seconds: float,
    write: Callable[[list[Row]], object],
) -> list[Row]:
    """Measure group by group, and write after each."""
    start = time.perf_counter()
    rows: list[Row] = []
    for group, variants in chosen:
        if time.perf_counter() - start > seconds:
            late = {"group": group, "failed": f"not started within --seconds {seconds:.0f}"}
            rows += [late | {"variant": variant.name} for variant in variants]
        else:
            torch._dynamo.reset()  # or another micro-batch would meet kernels for dynamic shapes
            rows += _measure(group, shape, variants, repeats)
            left = _collect()
            _say(f"{group}: done at {time.perf_counter() - start:.0f} s, {left:.1f} GiB left over")
        write(rows)
    return rows


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=("cuda", "cpu"), default=default)
    parser.add_argument("--out", type=Path, default=results_file.RESULTS)
    parser.add_argument("--only", default="", help="only groups whose name contains this")
    parser.add_argument("--repeats", type=int, help="timed steps a variant (GPU 4, CPU 15)")
    parser.add_argument("--seconds", type=float, default=1e9, help="start no group after this long")
    parser.add_argument("--profile", action="store_true", help="also write a kernel profile")
    args = parser.parse_args(argv)
    if args.device != default:
        parser.error(f"--device {args.device}: this machine has {default}; hide it to choose")
    _start_megatron(args.device)
    shape = PAPER_2B if args.device == "cuda" else SMALL
    repeats = args.repeats or (4 if args.device == "cuda" else 15)
    environment = results_file.environment(
        "step", args.device, argv, threads=torch.get_num_threads()
    )
    write = partial(
        results_file.write,
        args.out,
        "step",
        environment,
        shape={k: str(v) for k, v in vars(shape).items()},
        conventions=f"{MFU_NOTE}; peak {PEAK_FLOPS / 1e12:.0f} TFLOP/s",
    )
    chosen = [(name, variants) for name, variants in groups() if args.only in name]
    rows = _run(chosen, shape, repeats, args.seconds, write)
    print(_table(rows))
    path = results_file.path(args.out, "step", environment)
    _plot(rows, f"training step, {shape.name}, {environment['device']}", path.with_suffix(".png"))
    if args.profile:
        _profile(shape, path.with_name(f"{path.stem}-profile.txt"))


if __name__ == "__main__":
    main()
