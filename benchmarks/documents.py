"""Attention within documents, forward and backward: ours beside a mask, and beside none.

    python -m benchmarks.documents [--repeats 20] [--out DIR]

Samples are packed from documents whose lengths are exponentially distributed, as text's roughly are. The
peers take turns. "Across documents" is another result: it is what attention costs without the flag. Prints a
table and writes `documents-<machine>.json`.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from megatron.core.transformer.enums import AttnBackend, AttnMaskType
from torch import Tensor
from torch.nn import functional

from benchmarks import results_file
from megatron_ext.model.attention import SdpaCoreAttention
from megatron_ext.model.documents import Documents

HEAD = ("tokens", "samples", "heads", "key heads", "head size", "mean length")
# Those of a GPU are the 2B model of arXiv 2406.12397 and Llama 3 8B.
MODELS = {
    "cpu": ((2048, 2, 8, 8, 64), (4096, 1, 8, 2, 64)),
    "cuda": ((4096, 2, 32, 32, 64), (8192, 1, 32, 8, 128)),
}
LENGTHS = (128, 512, 2048)
PEERS = ("across documents", "a mask over all pairs", "ours")
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def packed(tokens: int, samples: int, mean: int, *, seed: int = 1) -> Documents:
    """Documents of samples that are cut out of a stream of them."""
    random = np.random.default_rng(seed)
    rows = torch.full((samples, tokens + 1), tokens, dtype=torch.int32)
    rows[:, 0] = 0
    for row in rows:
        ends = (1 + random.exponential(mean, size=tokens)).astype(np.int64).cumsum()
        ends = ends[ends < tokens]
        row[1 : len(ends) + 1] = torch.from_numpy(ends)
    return Documents.from_lengths(rows)


def peers(documents: Documents, tokens: int, device: str) -> dict[str, Attend]:
    """By name, what takes queries, keys and values `[s, b, heads, d]` and returns the context."""
    config: Any = SimpleNamespace(
        attention_dropout=0.0, attention_backend=AttnBackend.auto, context_parallel_size=1
    )
    native = SdpaCoreAttention(config, 1, AttnMaskType.causal, attention_type="self")
    mask = torch.zeros(len(documents.bounds), 1, tokens, tokens, dtype=torch.bool, device=device)
    for sample, row in enumerate(documents.bounds):
        for start, end in pairwise(row):
            mask[sample, :, start:end, start:end] = True
    mask = mask.tril()

    def masked(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        parts = (t.permute(1, 2, 0, 3) for t in (query, key, value))
        grouped = query.shape[2] != key.shape[2]
        context = functional.scaled_dot_product_attention(
            *parts, attn_mask=mask, enable_gqa=grouped
        )
        return context.permute(2, 0, 1, 3).flatten(2)

    def ours(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return native(query, key, value, packed_seq_params=documents)

    return dict(zip(PEERS, (native, masked, ours), strict=True))


def measure(shape: tuple[int, ...], mean: int, device: str, repeats: int) -> dict[str, float]:
    """Milliseconds of a forward and backward pass by peer, the median of `repeats`."""
    tokens, samples, heads, groups, size = shape
    documents = packed(tokens, samples, mean)
    kind = torch.bfloat16 if device == "cuda" else torch.float32
    generator = torch.Generator().manual_seed(1)
    inputs = [
        torch.randn(tokens, samples, n, size, generator=generator).to(device, kind).requires_grad_()
        for n in (heads, groups, groups)
    ]
    gradient = torch.ones(tokens, samples, heads * size, device=device, dtype=kind)
    own = peers(documents, tokens, device)
    bound = 2e-2 if device == "cuda" else 1e-4
    context, expected = (own[name](*inputs).detach() for name in (PEERS[2], PEERS[1]))
    torch.testing.assert_close(context, expected, rtol=bound, atol=bound)
    found: dict[str, list[float]] = {name: [] for name in PEERS}
    for _ in range(repeats + 3):
        for name, attend in own.items():
            start = _now(device)
            torch.autograd.grad(attend(*inputs), inputs, gradient)
            found[name].append(_now(device) - start)
    return {name: statistics.median(times[3:]) * 1e3 for name, times in found.items()}


def _now(device: str) -> float:
    """Seconds, with the device idle."""
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--out", type=Path, default=results_file.RESULTS)
    args = parser.parse_args(argv)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    print("  ".join([*HEAD, *(f"{name:>22}" for name in PEERS)]))
    rows = []
    for shape in MODELS[device]:
        for mean in LENGTHS:
            found = measure(shape, mean, device, args.repeats)
            cells = [f"{ms:9.1f} ms {ms / found['ours']:7.2f}x" for ms in found.values()]
            sizes = zip(HEAD, (*shape, mean), strict=True)
            words = [f"{size:>{len(name)}}" for name, size in sizes]
            print("  ".join([*words, *(f"{cell:>22}" for cell in cells)]), flush=True)
            rows.append({"shape": dict(zip(HEAD, (*shape, mean), strict=True)), "ms": found})
    more = {"threads": torch.get_num_threads(), "repeats": args.repeats}
    environment = results_file.environment("documents", device, argv, **more)
    results_file.write(args.out, "documents", environment, rows)


if __name__ == "__main__":
    main()
