"""Where the time of the fused head goes on a GPU, and the choice of its kernels' block sizes.

`python -m benchmarks.head_phases [--tune]`: each matrix product and kernel by itself, with what it
achieves; `--tune` times the kernels over block sizes and warps. The kernels are those of
`benchmarks.candidate`; the whole head is timed with the default ones. Writes
`head-phases-<machine>.json`, for a shape of your own with it in the name.
"""

import argparse
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import candidate, results_file
from benchmarks.peers import make_workload, ours, terms

SIZE = (8192, 2048, 131072)  # tokens, hidden, vocabulary


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
    stats = candidate.shard_statistics(z, w.labels, reference_logits=t, **columns)
    rows = candidate.combine_statistics(stats[None])
    grad = torch.rand(tokens, device="cuda") / tokens
    out = torch.empty_like(z)
    size = 2.0 * tokens * vocab

    def statistics(reference):
        candidate.shard_statistics(z, w.labels, reference_logits=reference, **columns)

    def gradient(grad_kl):
        candidate.logits_gradient(
            z, w.labels, rows, grad, grad_kl, reference_logits=t, out=out, **columns
        )

    phases: list[tuple[str, Callable[[], object], float]] = [
        ("statistics, no reference", lambda: statistics(None), size),
        ("statistics, reference", lambda: statistics(t), 2 * size),
        ("gradient, no reference", lambda: gradient(None), 2 * size),
        ("gradient, reference", lambda: gradient(grad), 3 * size),
        ("combine", lambda: candidate.combine_statistics(stats[None]), 0),
        ("copy of the logits", lambda: out.copy_(z), 2 * size),
    ]
    results = []
    for name, function, moved in phases:
        ms = milliseconds(function)
        results.append({"phase": name, "ms": ms, "rate": moved / ms / 1e6, "unit": "GB/s"})
    out.normal_().mul_(1e-3)
    flop = 2.0 * tokens * hidden * vocab
    for name, function in _products(h, weight, z, out):
        ms = milliseconds(function)
        results.append({"phase": name, "ms": ms, "rate": flop / ms / 1e9, "unit": "TFLOP/s"})
    return results


def _products(
    h: Tensor, weight: Tensor, z: Tensor, d: Tensor
) -> Iterator[tuple[str, Callable[[], object]]]:
    """The head's matrix products, and others that give the same, from the second of a kind on."""
    d_hidden, d_weight = torch.empty_like(h), torch.empty_like(weight)
    h_t, weight_t = h.t().contiguous(), weight.t().contiguous()
    fp32: dict[str, Any] = {"out_dtype": torch.float32}
    for library in ("cublas", "cublaslt"):
        torch.backends.cuda.preferred_blas_library(library)
        yield f"{library}: logits = h W'", lambda: torch.mm(h, weight.t(), out=z)
        yield f"{library}: logits = (W h')'", lambda: torch.mm(weight, h.t())
        yield f"{library}: dh = d W", lambda: torch.mm(d, weight, out=d_hidden)
        yield f"{library}: dh = (W' d')'", lambda: torch.mm(weight.t(), d.t())
        yield f"{library}: dh, W transposed", lambda: torch.mm(d, weight_t.t(), out=d_hidden)
        yield f"{library}: dW = d' h", lambda: torch.mm(d.t(), h, out=d_weight)
        yield f"{library}: dW = (h' d)'", lambda: torch.mm(h.t(), d)
        yield f"{library}: dW, h transposed", lambda: torch.mm(d.t(), h_t.t(), out=d_weight)
        yield f"{library}: dW = (h' d)', h transposed", lambda: torch.mm(h_t, d)
    torch.backends.cuda.preferred_blas_library("default")
    total = torch.zeros_like(weight, dtype=torch.float32)
    yield "dW += d' h, fp32", lambda: torch.addmm(total, d.t(), h, out=total, **fp32)
    yield "dW = d' h, fp32", lambda: torch.mm(d.t(), h, **fp32)
    yield "logits in fp32", lambda: torch.mm(h, weight.t(), **fp32)


def whole(tokens: int, hidden: int, vocab: int) -> list[dict]:
    """Forward and backward of the head, for several budgets and options; what the host takes."""
    results = []
    logit_row = 2 * vocab
    for reference in ("none", "half", "all"):
        w = make_workload(
            tokens, hidden, vocab, reference=reference, dtype=torch.bfloat16, device="cuda"
        )
        for name, loss, options in (
            ("", ours, {}),
            (" chunks of 1/4 of both", ours, {"chunk_size": tokens // 4}),
            (" fp32 logits", ours, {"fp32_logits": True}),
            (" terms", terms, {}),
            (
                " terms, reference in chunks of 1/16",
                terms,
                {"memory_budget_bytes": logit_row * tokens * 17 // 16},
            ),
        ):
            if name and reference != "all":
                continue

            def step(w=w, loss=loss, options=options):
                w.hidden.grad = w.weight.grad = None
                loss(w, **options).backward()

            def forward(w=w, loss=loss, options=options):
                loss(w, **options)

            label = f"head, reference {reference}{name}"
            for suffix, function in (("", step), (", forward", forward)):
                results.append({"phase": label + suffix, "ms": milliseconds(function, 6)})
            torch.cuda.synchronize()
            start = time.perf_counter()
            step()
            host = (time.perf_counter() - start) * 1e3
            results.append({"phase": label + ", host until all is launched", "ms": host})
    return results


def overlap(tokens: int, hidden: int, vocab: int, parts: int) -> list[dict]:
    """Kernels of one part of the tokens on a stream of their own, under the products of others."""
    w = make_workload(tokens, hidden, vocab, reference="all", dtype=torch.bfloat16, device="cuda")
    h, weight = w.hidden.detach(), w.weight.detach()
    columns = {"vocab_start": 0, "valid_columns": vocab}
    grad = torch.rand(tokens, device="cuda") / tokens
    z = torch.empty(tokens, vocab, dtype=h.dtype, device="cuda")
    t = torch.empty_like(z)
    d_hidden, d_weight = torch.empty_like(h), torch.empty_like(weight)
    slices = [slice(i * tokens // parts, (i + 1) * tokens // parts) for i in range(parts)]
    side = torch.cuda.Stream()

    def on_side(function, apart):
        if not apart:
            return function()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            return function()

    def statistics(part):
        stats = candidate.shard_statistics(
            z[part], w.labels[part], reference_logits=t[part], **columns
        )
        return candidate.combine_statistics(stats[None])

    def step(apart):
        rows, ready = [], []
        for part in slices:
            torch.mm(h[part], weight.t(), out=z[part])
            torch.mm(w.reference_hidden[part], w.reference_weight.t(), out=t[part])
            rows.append(on_side(lambda part=part: statistics(part), apart))
        for part, row in zip(slices, rows, strict=True):

            def gradient(part=part, row=row):
                candidate.logits_gradient(
                    z[part],
                    w.labels[part],
                    row,
                    grad[part],
                    grad[part],
                    reference_logits=t[part],
                    out=z[part],
                    **columns,
                )
                ready.append(torch.cuda.current_stream().record_event())

            on_side(gradient, apart)
        for part, event in zip(slices, ready, strict=True):
            torch.cuda.current_stream().wait_event(event)
            torch.mm(z[part], weight, out=d_hidden[part])
        torch.mm(z.t(), h, out=d_weight)

    return [
        {"phase": f"bare head in {parts} parts, {name}", "ms": milliseconds(lambda a=a: step(a), 6)}
        for name, a in (("one stream", False), ("two streams", True))
    ]


def tune(tokens: int, vocab: int) -> list[dict]:
    """Kernel times over their shapes, best first."""
    make: dict[str, Any] = {"device": "cuda", "dtype": torch.float32}
    z = (torch.randn(tokens, vocab, **make) * 2).bfloat16()
    t = (z.float() + 0.1 * torch.randn(tokens, vocab, **make)).bfloat16()
    labels = torch.randint(vocab, (tokens,), device="cuda")
    columns = {"vocab_start": 0, "valid_columns": vocab}
    stats = candidate.shard_statistics(z, labels, reference_logits=t, **columns)
    rows = candidate.combine_statistics(stats[None])
    grad, out = torch.rand(tokens, device="cuda"), torch.empty_like(z)
    row_shapes = [(1, 2), (1, 4), (2, 1), (2, 2), (2, 4), (4, 1), (4, 2), (4, 4), (8, 1), (8, 2)]
    tiles = [(4, 512, 16), (4, 1024, 4), (4, 1024, 16), (4, 1024, 128), (4, 2048, 8)]
    tiles += [(8, 2048, 1), (8, 2048, 8), (2, 512, 16), (8, 4096, 4)]
    runs = {
        "MARGIN": (row_shapes, 1, lambda: _statistics(z, labels, None, columns)),
        "DIVERGENCE": (row_shapes, 2, lambda: _statistics(z, labels, t, columns)),
        "GRADIENT": (
            tiles,
            3,
            lambda: candidate.logits_gradient(
                z, labels, rows, grad, grad, reference_logits=t, out=out, **columns
            ),
        ),
    }
    results = []
    for name, (shapes, passes, function) in runs.items():
        names = ("WARPS", "BLOCK", "TILES") if name == "GRADIENT" else ("WARPS", "LOADS")
        before = [getattr(candidate, f"{name}_{field}") for field in names]
        found = []
        for shape in shapes:
            for field, value in zip(names, shape, strict=True):
                setattr(candidate, f"{name}_{field}", value)
            ms = milliseconds(function, 4)
            label = " ".join(f"{f.lower()} {v}" for f, v in zip(names, shape, strict=True))
            rate = passes * 2.0 * tokens * vocab / ms / 1e6
            found.append(
                {"phase": f"{name.lower()} {label}", "ms": ms, "rate": rate, "unit": "GB/s"}
            )
        for field, value in zip(names, before, strict=True):
            setattr(candidate, f"{name}_{field}", value)
        results += sorted(found, key=lambda row: row["ms"])
    return results


def _statistics(z: Tensor, labels: Tensor, t: Tensor | None, columns: dict[str, int]) -> Tensor:
    return candidate.shard_statistics(z, labels, reference_logits=t, **columns)


def show(results: list[dict]) -> None:
    for row in results:
        rate = f"{row['rate']:9.0f} {row['unit']}" if row.get("rate") else ""
        print(f"{row['phase']:<64} {row['ms']:9.3f} ms {rate}")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=SIZE[0])
    parser.add_argument("--hidden", type=int, default=SIZE[1])
    parser.add_argument("--vocab", type=int, default=SIZE[2])
    parser.add_argument("--tune", action="store_true")
    parser.add_argument("--out", type=Path, default=results_file.RESULTS)
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        parser.error("expected a CUDA device, found none")
    size = (args.tokens, args.hidden, args.vocab)
    parts: list[Callable[[], list[dict]]] = [
        lambda: measure(*size),
        lambda: whole(*size),
        lambda: whole(2048, 2048, 32768),
        lambda: overlap(*size, parts=2),
        lambda: overlap(*size, parts=4),
    ]
    if args.tune:
        parts.append(lambda: tune(args.tokens, args.vocab))
    results = []
    for part in parts:
        found = part()
        show(found)
        results += found
        torch.cuda.empty_cache()
    environment = results_file.environment(
        "head_phases",
        "cuda",
        argv,
        dtype="torch.bfloat16",
        shape="{} tokens x {} hidden x {:,} columns".format(*size),
    )
    shape = "" if size == SIZE else "-{}x{}x{}".format(*size)
    results_file.write(args.out, "head_phases", environment, results, shape)


if __name__ == "__main__":
    main()
