"""A rank's experts, forward and backward: the torch-native layers' beside Megatron's local ones.

    python -m benchmarks.experts [--repeats 20] [--out DIR]

Rows go to random experts, as many as tokens times experts a token; weights, gradients of weights, rows and
the router's weights. The peers take turns within a shape. Prints a table and writes
`experts-<machine>.json`.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks import results_file

# Experts of a rank, hidden size, their width, tokens, experts a token. The last of a GPU is Qwen3-30B-A3B at
# EP 8, the one before it Mixtral 8x7B at EP 4.
SHAPES = {
    "cpu": ((4, 512, 1024, 1024, 2), (32, 256, 128, 1024, 4), (64, 512, 96, 1024, 8)),
    "cuda": ((8, 2048, 1408, 8192, 2), (2, 4096, 14336, 8192, 2), (16, 2048, 768, 8192, 8)),
}
PEERS = ("Megatron's local experts", "ours", "ours, --moe-grouped-gemm")


def build(shape: tuple[int, ...], device: str) -> dict[str, Any]:
    """The peers' modules, with the same weights."""
    from megatron.core.models.backends import LocalSpecProvider
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.transformer import TransformerConfig

    from megatron_ext.model.experts import TorchSpecProvider

    experts, hidden, width, _, chosen = shape
    half = device == "cuda"
    found: dict[str, Any] = {}
    for name in PEERS:
        config = TransformerConfig(
            **{"num_layers": 1, "hidden_size": hidden, "num_attention_heads": 1},
            **{"num_moe_experts": experts, "moe_router_topk": chosen, "moe_ffn_hidden_size": width},
            **{"ffn_hidden_size": width, "gated_linear_unit": True, "add_bias_linear": False},
            **{"activation_func": functional.silu, "bias_activation_fusion": True},
            **{"bf16": half, "params_dtype": torch.bfloat16 if half else torch.float32},
            moe_grouped_gemm=name == PEERS[2],
            gradient_accumulation_fusion=False,
        )
        provider = LocalSpecProvider() if name == PEERS[0] else TorchSpecProvider()
        groups = ProcessGroupCollection.use_mpu_process_groups()
        module = provider.grouped_mlp_modules(False)(experts, config, pg_collection=groups)
        found[name] = module.to(device)
        module.load_state_dict(found[PEERS[0]].state_dict())
    return found


def measure(shape: tuple[int, ...], device: str, repeats: int) -> dict[str, float]:
    """Milliseconds of a forward and backward pass by peer, the median of `repeats`."""
    modules = build(shape, device)
    experts, hidden, _, tokens, chosen = shape
    kind = torch.bfloat16 if device == "cuda" else torch.float32
    generator = torch.Generator().manual_seed(1)
    rows = torch.bincount(
        torch.randint(experts, (tokens * chosen,), generator=generator), minlength=experts
    )
    given = torch.randn(tokens * chosen, hidden, generator=generator).to(device, kind)
    weights = torch.rand(tokens * chosen, generator=generator).to(device)
    times: dict[str, list[float]] = {name: [] for name in modules}
    for _ in range(repeats + 3):
        for name, module in modules.items():
            module.zero_grad(set_to_none=True)
            inputs = [given.clone().requires_grad_(), weights.clone().requires_grad_()]
            times[name].append(_seconds(lambda m=module, i=inputs: _pass(m, rows, *i), device))
    return {name: statistics.median(found[3:]) * 1e3 for name, found in times.items()}


def _pass(module: Any, rows: Tensor, hidden: Tensor, weights: Tensor) -> None:
    out, _ = module(hidden, rows, weights)
    out.backward(torch.ones_like(out))


def _seconds(run: Callable[[], None], device: str) -> float:
    """Until the device is idle again: the launches of many small kernels are part of it."""
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    wait()
    start = time.perf_counter()
    run()
    wait()
    return time.perf_counter() - start


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--out", type=Path, default=results_file.RESULTS)
    args = parser.parse_args(argv)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    from megatron_ext.runtime import cpu

    cpu.enable()
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    store = torch.distributed.HashStore()
    backend = "nccl" if device == "cuda" else "gloo"
    torch.distributed.init_process_group(backend, store=store, rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    model_parallel_cuda_manual_seed(1)
    head = ("experts", "hidden", "width", "tokens", "top-k")
    print("  ".join([*head, *(f"{name:>24}" for name in PEERS)]))
    rows = []
    for shape in SHAPES[device]:
        found = measure(shape, device, args.repeats)
        first = found[PEERS[0]]
        cells = [f"{ms:9.1f} ms {first / ms:9.2f}x" for ms in found.values()]
        sizes = [f"{size:>{len(name)}}" for name, size in zip(head, shape, strict=True)]
        print("  ".join([*sizes, *(f"{cell:>24}" for cell in cells)]), flush=True)
        rows.append({"shape": dict(zip(head, shape, strict=True)), "ms": found})
    more = {"threads": torch.get_num_threads(), "repeats": args.repeats}
    environment = results_file.environment("experts", device, argv, **more)
    results_file.write(args.out, "experts", environment, rows)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    os.environ.setdefault("LOCAL_RANK", "0")
    main()
