"""Where the time of the fused head goes on a GPU, and the choice of its kernels' block sizes.

`python -m benchmarks.head_phases [--tune]`: each matrix product and kernel by itself, with what it
achieves; `--tune` times the kernels over block sizes and warps.
"""

import argparse
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.peers import make_workload, ours
from megatron_ext.losses import head_kernels, head_triton
from megatron_ext.losses.vocab_parallel import RowStatistics, combine_statistics


def milliseconds(function: Callable[[], object], repeats: int = 8) -> float:
    """Median time between CUDA events."""
    for _ in range(2):
        function()
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        function()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return sorted(times)[len(times) // 2]


def measure(tokens: int, hidden: int, vocab: int) -> list[dict]:
    """One row a phase: milliseconds and TFLOP/s or GB/s."""
    w = make_workload(tokens, hidden, vocab, reference="all", dtype=torch.bfloat16, device="cuda")
    h, weight = w.hidden.detach(), w.weight.detach()
    z, t = h @ weight.t(), w.reference_hidden @ w.reference_weight.t()
    columns = {"vocab_start": 0, "valid_columns": vocab}
    rows = _rows(z, t, w.labels)
    grad = torch.rand(tokens, device="cuda") / tokens
    out = torch.empty_like(z)
    d_hidden, d_weight = torch.empty_like(h), torch.empty_like(weight)
    d_weight32 = torch.zeros_like(weight, dtype=torch.float32)
    flop = 2.0 * tokens * hidden * vocab
    size = 2.0 * tokens * vocab
    d = out.normal_() * 1e-3
    phases: list[tuple[str, Callable[[], object], float, float]] = [
        ("logits = h W'", lambda: torch.mm(h, weight.t(), out=z), flop, 0),
        ("logits in fp32", lambda: torch.mm(h, weight.t(), out_dtype=torch.float32), flop, 0),
        ("dh = d W", lambda: torch.mm(d, weight, out=d_hidden), flop, 0),
        ("dW = d' h, bf16", lambda: torch.mm(d.t(), h, out=d_weight), flop, 0),
        (
            "dW += d' h, fp32",
            lambda: torch.addmm(d_weight32, d.t(), h, out_dtype=torch.float32, out=d_weight32),
            flop,
            0,
        ),
        (
            "statistics, no reference",
            lambda: head_triton.shard_statistics(z, w.labels, **columns),
            0,
            size,
        ),
        (
            "statistics, reference",
            lambda: head_triton.shard_statistics(z, w.labels, reference_logits=t, **columns),
            0,
            2 * size,
        ),
        (
            "gradient, no reference",
            lambda: head_triton.logits_gradient(z, w.labels, rows, grad, None, out=out, **columns),
            0,
            2 * size,
        ),
        (
            "gradient, reference",
            lambda: head_triton.logits_gradient(
                z, w.labels, rows, grad, grad, reference_logits=t, out=out, **columns
            ),
            0,
            3 * size,
        ),
        ("combine", lambda: _rows(z[:, :128], t[:, :128], w.labels % 128), 0, 0),
        ("copy of the logits", lambda: out.copy_(z), 0, 2 * size),
    ]
    results = []
    for name, function, flops, moved in phases:
        time = milliseconds(function)
        rate = flops / time / 1e9 if flops else moved / time / 1e6
        unit = "TFLOP/s" if flops else "GB/s"
        results.append({"phase": name, "ms": time, "rate": rate, "unit": unit})
    return results


def whole(tokens: int, hidden: int, vocab: int) -> list[dict]:
    """Forward and backward of the head, for several chunk sizes and options."""
    results = []
    for reference in ("none", "half", "all"):
        w = make_workload(
            tokens, hidden, vocab, reference=reference, dtype=torch.bfloat16, device="cuda"
        )
        for options in ({}, {"chunk_size": 4096}, {"chunk_size": 2048}, {"fp32_logits": True}):
            if options and reference != "all":
                continue

            def step(w=w, options=options):
                w.hidden.grad = w.weight.grad = None
                ours(w, **options).backward()

            def forward(w=w, options=options):
                ours(w, **options)

            label = f"head, reference {reference} {options or ''}".strip()
            results.append({"phase": label, "ms": milliseconds(step, 6)})
            results.append({"phase": label + ", forward", "ms": milliseconds(forward, 6)})
    return results


def tune(tokens: int, vocab: int) -> list[dict]:
    """Kernel times over block sizes and warps, best first."""
    make: dict[str, Any] = {"device": "cuda", "dtype": torch.float32}
    z = (torch.randn(tokens, vocab, **make) * 2).bfloat16()
    t = (z.float() + 0.1 * torch.randn(tokens, vocab, **make)).bfloat16()
    labels = torch.randint(vocab, (tokens,), device="cuda")
    rows = _rows(z, t, labels)
    stats = torch.empty(5, tokens, dtype=torch.float64, device="cuda")
    grad = torch.rand(tokens, device="cuda")
    out = torch.empty_like(z)
    results = []

    def margin(block, warps):
        head_kernels.margin_kernel[(tokens,)](
            z, labels, stats, vocab, tokens, 0, vocab, BLOCK=block, num_warps=warps
        )

    def divergence(block, warps):
        head_kernels.divergence_kernel[(tokens,)](
            z, t, labels, stats, vocab, vocab, tokens, 0, vocab, BLOCK=block, num_warps=warps
        )

    def gradient(block, warps, with_kl=True):
        head_kernels.gradient_kernel[(tokens, math.ceil(vocab / block))](
            z,
            t,
            out,
            labels,
            rows.margin,
            rows.lse_rest,
            rows.lse_z,
            rows.lse_t,
            grad,
            grad,
            vocab,
            vocab,
            vocab,
            0,
            vocab,
            vocab,
            BLOCK=block,
            WITH_MARGIN=True,
            WITH_KL=with_kl,
            num_warps=warps,
        )

    for kernel, passes in ((margin, 1), (divergence, 2), (gradient, 3)):
        found = []
        for block, warps in _shapes():
            time = milliseconds(lambda k=kernel, b=block, n=warps: k(b, n), 4)
            found.append(
                {
                    "phase": f"{kernel.__name__} block {block} warps {warps}",
                    "ms": time,
                    "rate": passes * 2.0 * tokens * vocab / time / 1e6,
                    "unit": "GB/s",
                }
            )
        results += sorted(found, key=lambda row: row["ms"])[:6]
    return results


def _shapes() -> Iterator[tuple[int, int]]:
    """Block sizes and warps with 4 to 32 columns a thread."""
    for block in (1024, 2048, 4096, 8192, 16384):
        for warps in (4, 8, 16, 32):
            if 4 <= block // (32 * warps) <= 32:
                yield block, warps


def _rows(z: Tensor, t: Tensor, labels: Tensor) -> RowStatistics:
    stats = head_triton.shard_statistics(
        z, labels, reference_logits=t, vocab_start=0, valid_columns=z.shape[1]
    )
    return combine_statistics(stats[None])


def show(results: list[dict]) -> None:
    for row in results:
        rate = f"{row['rate']:9.0f} {row['unit']}" if row.get("rate") else ""
        print(f"{row['phase']:<48} {row['ms']:9.3f} ms {rate}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--vocab", type=int, default=131072)
    parser.add_argument("--tune", action="store_true")
    parser.add_argument("--out", type=Path, help="folder for the JSON")
    args = parser.parse_args()
    results = measure(args.tokens, args.hidden, args.vocab)
    torch.cuda.empty_cache()
    results += whole(args.tokens, args.hidden, args.vocab)
    torch.cuda.empty_cache()
    if args.tune:
        results += tune(args.tokens, args.vocab)
    show(results)
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "head_phases.json").write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
