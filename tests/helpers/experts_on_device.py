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


def main() -> None:
    """Print the copies of a pass, and the largest difference of its gradients from those of the host."""
    found: dict[str, Any] = {}
    for where in ("host", "device"):
        gradients = []
        for device in ("cpu", "cuda"):
            experts = _Experts(moe_grouped_gemm=True, bias_activation_fusion=False).to(device)
            hidden, rows, probs = _inputs()
            given = [t.detach().to(device).requires_grad_() for t in (hidden, probs)]
            counts = rows if where == "host" else rows.to(device)
            with Copies() as copies:
                experts(given[0], counts, given[1])[0].square().sum().backward()
            gradients.append([t.grad.cpu() for t in (*given, *experts.parameters())])
        pairs = zip(*gradients, strict=True)
        distance = max(float((a - b).abs().max() / (a.abs().max() + 1e-30)) for a, b in pairs)
        found[where] = {"copies": copies.found, "distance": distance}
    print(json.dumps(found))


main()
