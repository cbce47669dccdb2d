"""Experts on the simulated device: what is copied to it from the host, and gradients beside the host's.

Run by the server of `simulated_cuda`; prints one line of JSON.
"""

import json
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.helpers.simulated_cuda import on_device
from tests.unit.test_model_experts import _Experts, _inputs

aten = torch.ops.aten


class Copies(TorchDispatchMode):
    """Of each copy from the host to the device: whether it is pinned memory that is not waited for."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[bool] = []
        self._pinned: list[torch.Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        kind = func.overloadpacket
        if kind is aten._pin_memory:
            self._pinned.append(out)
        if kind in (aten._to_copy, aten.copy_):
            source = args[0] if kind is aten._to_copy else args[1]
            if on_device(out) and not on_device(source):
                pinned = any(source.data_ptr() == t.data_ptr() for t in self._pinned)
                waits = not (kwargs.get("non_blocking") or True in args[2:])
                self.found.append(pinned and not waits)
        return out


CASES = {
    "host": {"counts_on_host": True, "fuse": False},
    "host, fused": {"counts_on_host": True, "fuse": True},
    "device": {"counts_on_host": False, "fuse": False},
}


def gradients(
    device: str, *, counts_on_host: bool, fuse: bool
) -> tuple[list[torch.Tensor], list[bool]]:
    """Gradients of one pass, of rows, router's weights and experts' weights; and its copies."""
    settings = {"moe_grouped_gemm": True, "bias_activation_fusion": False}
    experts = _Experts(gradient_accumulation_fusion=fuse, **settings).to(device)
    weights = list(experts.parameters())
    for weight in weights:
        weight.main_grad = torch.zeros_like(weight)  # type: ignore[attr-defined]
        weight.grad_added_to_main_grad = False  # type: ignore[attr-defined]
    hidden, rows, probs = _inputs()
    given = [t.detach().to(device).requires_grad_() for t in (hidden, probs)]
    counts = rows if counts_on_host else rows.to(device)
    with Copies() as copies:
        experts(given[0], counts, given[1])[0].square().sum().backward()
    assert all(weight.grad_added_to_main_grad == fuse for weight in weights)  # type: ignore[attr-defined]
    found: list[Any] = [weight.main_grad if fuse else weight.grad for weight in weights]
    return [t.cpu() for t in (given[0].grad, given[1].grad, *found)], copies.found


def main() -> None:
    """Print the copies of a pass, and the largest difference of its gradients from those of the host."""
    found: dict[str, Any] = {}
    expected, _ = gradients("cpu", counts_on_host=True, fuse=False)
    for name, place in CASES.items():
        ours, copies = gradients("cuda", **place)
        pairs = zip(expected, ours, strict=True)
        distance = max(float((a - b).abs().max() / (a.abs().max() + 1e-30)) for a, b in pairs)
        found[name] = {"copies": copies, "distance": distance}
    print(json.dumps(found))


main()
