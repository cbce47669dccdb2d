"""Parts of a transformer layer on a GPU, each beside the fewest bytes or FLOPs that it needs.

    python -m benchmarks.layers [--out DIR]

Shapes of the 2B model of arXiv 2406.12397 at micro-batch 2, bf16, forward and backward together.
The time is the GPU's alone, as in a training step, where the host is far ahead. Prints a table and
writes `layers-<machine>.json`; without a GPU nothing is measured.
"""

import argparse
import statistics
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks import results_file

S, B, HEADS, D, FFN = 4096, 2, 32, 64, 5504
HIDDEN = HEADS * D
Run = Callable[[], Any]
Part = tuple[str, Callable[[], Run], float, float]  # name, what builds its run, bytes, FLOPs


def _random(*shape: int) -> Tensor:
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16).requires_grad_()


def _round_trip(forward: Callable[[], Tensor], inputs: list[Tensor]) -> Callable[[], None]:
    """Forward and backward, without accumulation into gradients that are there already."""
    grad = torch.randn_like(forward())

    def run() -> None:
        torch.autograd.grad(forward(), inputs, grad)

    return run


def _attention() -> Iterator[Part]:
    mixed = _random(S, B, HEADS, 3, D)
    # Four products of s * s * d a head forward and ten backward, the masked half left out.
    flops = 7 * B * HEADS * S * S * D
    for backend in (
        SDPBackend.CUDNN_ATTENTION,
        SDPBackend.FLASH_ATTENTION,
        SDPBackend.EFFICIENT_ATTENTION,
    ):

        def forward(backend: SDPBackend = backend) -> Tensor:
            q, k, v = (t.permute(1, 2, 0, 3) for t in mixed.unbind(3))
            with sdpa_kernel(backend):
                out = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
            return out.permute(2, 0, 1, 3).flatten(2)

        build = partial(_round_trip, forward, [mixed])
        yield f"attention, {backend.name.lower()}", build, 0.0, flops


def _rotation() -> Iterator[Part]:
    from megatron.core.models.common.embeddings.rope_utils import _apply_rotary_pos_emb_bshd

    from megatron_ext.model.rope import cos_sin, split_rotate

    angles = torch.outer(torch.arange(S), 1e4 ** -torch.linspace(0, 1, D // 2)).repeat(1, 2)
    freqs = angles[:, None, None].cuda()
    source = _random(S, B, 3 * HIDDEN)
    unit = 2.0 * S * B * HIDDEN

    def ours() -> Tensor:
        return torch.stack(split_rotate(source * 1, *cos_sin(freqs), groups=HEADS, heads=1))

    def megatron() -> Tensor:
        q, k, v = (source * 1).unflatten(-1, (HEADS, 3, D)).unbind(3)
        return torch.stack([_apply_rotary_pos_emb_bshd(t, freqs) for t in (q, k)] + [v])

    def neither() -> Tensor:
        return torch.stack((source * 1).unflatten(-1, (HEADS, 3, D)).unbind(3))

    # Forward reads and writes queries and keys; backward reads and writes all three. The copy that
    # `source * 1` makes and the stack are in all three rows: subtract the last one.
    for name, forward in (("ours", ours), ("Megatron", megatron), ("none", neither)):
        yield f"rotation, {name}", partial(_round_trip, forward, [source]), 10 * unit, 0.0


def _elementwise() -> Iterator[Part]:
    from types import SimpleNamespace

    from megatron.core.fusions.fused_bias_swiglu import bias_swiglu_impl

    from megatron_ext.model.norm import TorchNorm

    config: Any = SimpleNamespace(
        normalization="RMSNorm", layernorm_zero_centered_gamma=False, sequence_parallel=False
    )
    norm = TorchNorm(config, HIDDEN).cuda().bfloat16()
    x, gated = _random(S, B, HIDDEN), _random(S, B, 2 * FFN)
    unit = 2.0 * S * B
    rms = partial(_round_trip, lambda: norm(x), [x, norm.weight])
    yield "RMSNorm", rms, 5 * unit * HIDDEN, 0.0
    swiglu = partial(_round_trip, lambda: bias_swiglu_impl(gated, None), [gated])
    yield "SwiGLU (Megatron's)", swiglu, 8 * unit * FFN, 0.0


def _weight_gradient() -> Iterator[Part]:
    from megatron_ext.runtime.optimizer import _WeightGradient

    x, grad = _random(S * B, HIDDEN).detach(), _random(S * B, 2 * FFN).detach()
    total = torch.zeros(2 * FFN, HIDDEN, device="cuda")
    flops = 2.0 * S * B * HIDDEN * 2 * FFN
    yield (
        "weight gradient, product then add",
        lambda: lambda: total.add_(grad.t().matmul(x)),
        0.0,
        flops,
    )
    yield (
        "weight gradient, accumulated in the product",
        lambda: lambda: _WeightGradient.wgrad_gemm_accum_fp32(x, grad, total),
        0.0,
        flops,
    )


def _milliseconds(run: Run, *, repeats: int = 30) -> float:
    """Median time of the kernels of a call, from a cold L2 cache.

    The GPU sleeps first, until the host has launched everything: at 0.1 ms a call the launches
    through autograd would otherwise be what is measured.
    """
    for _ in range(3):
        run()
    cold = torch.empty(256 * 2**20, dtype=torch.int8, device="cuda")
    events = []
    for _ in range(repeats):
        cold.zero_()
        torch.cuda._sleep(4_000_000)  # cycles: about 2 ms
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        events.append((start, end))
        torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in events)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=results_file.RESULTS)
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("benchmarks.layers: needs a GPU, found none; nothing is measured")
        return
    torch.manual_seed(0)
    rows = []
    for parts in (_attention, _rotation, _elementwise, _weight_gradient):
        for name, build, size, flops in parts():
            try:
                milliseconds = _milliseconds(build())
            except RuntimeError as error:
                print(f"{name:<46} {str(error).splitlines()[0][:80]}")
                rows.append({"part": name, "failed": str(error)})
                continue
            rate = f"{size / milliseconds / 1e6:.0f} GB/s" if size else ""
            rate += f"{flops / milliseconds / 1e9:.0f} TFLOP/s" if flops else ""
            print(f"{name:<46} {milliseconds:8.3f} ms  {rate}")
            rows.append({"part": name, "ms": milliseconds, "bytes": size, "flops": flops})
    environment = results_file.environment("layers", "cuda", argv, dtype="torch.bfloat16")
    results_file.write(args.out, "layers", environment, rows)


if __name__ == "__main__":
    main()
