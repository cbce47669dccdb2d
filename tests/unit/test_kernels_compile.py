"""Every launch of the Triton kernels compiled as for an A100 and an H100: no GPU is needed for that.

A driver that only names its target stands in for CUDA's, and the launchers run up to the launch.
"""

import importlib
import math
import os
import re
import subprocess
from pathlib import Path

import pytest
import torch

from megatron_ext.losses.vocab_parallel import RowStatistics

triton = pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing"
)
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024}
# By capability, logits and columns of a shard: an A100 gets the rows that take most registers, of 4 bytes and
# an address that is no multiple of 16.
LOGITS = {80: (torch.float32, 32003), 90: (torch.bfloat16, 131072)}


class Target:
    """What Triton asks a driver before it compiles."""

    def __init__(self, capability):
        from triton.backends.compiler import GPUTarget

        self.target = GPUTarget("cuda", capability, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        return self.target


@pytest.fixture(params=[80, 90])
def compiled(request, monkeypatch, tmp_path):
    """Capability, and what was compiled so far: name of a kernel and the kernel."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "0")  # the default of Triton 3.10
    monkeypatch.setattr(triton.runtime.driver, "_active", Target(request.param))
    found = []
    run = triton.JITFunction.run

    def compile_only(self, *args, grid, warmup, **options):
        assert math.prod(grid) > 0
        assert grid[0] < 2**31
        assert max(grid[1:], default=1) < 2**16
        self.device_caches.clear()  # which hold the kernels of another target
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        self.device_caches.clear()
        found.append((self.fn.__qualname__, kernel))

    monkeypatch.setattr(triton.JITFunction, "run", compile_only)
    return request.param, found


def launch_head(module, dtype, columns):
    """All that the head launches; tensors without memory, of an address that is a multiple of 16."""
    tokens = 65536
    logits = torch.empty(tokens, columns, dtype=dtype, device="meta")
    labels = torch.empty(tokens, dtype=torch.int64, device="meta")
    single = torch.empty(tokens, dtype=torch.float32, device="meta")
    double = torch.empty(tokens, dtype=torch.float64, device="meta")
    rows = RowStatistics(single, single, double, double, double)
    place = {"vocab_start": columns, "valid_columns": columns - 3}
    for reference in (None, logits):
        stats = module.shard_statistics(logits, labels, reference_logits=reference, **place)
        if hasattr(module, "combine_kernel"):
            module.combine_statistics(stats.new_empty(8, *stats.shape))
    for margin, kl in ((single, None), (None, single), (single, single)):
        module.logits_gradient(logits, labels, rows, margin, kl, reference_logits=logits, **place)


def launch_rotation(dtype):
    from megatron_ext.model import rope_kernel

    for groups, heads, size, rotated in ((32, 1, 64, 64), (8, 4, 128, 128), (4, 8, 96, 32)):
        mixed = torch.empty(4096, 1, groups, heads + 2, size, dtype=dtype, device="meta")
        angles = torch.empty(4096, rotated // 2, device="meta")
        turned = mixed[..., : heads + 1, :]
        rope_kernel.rotate_into(turned, turned, angles, angles)
        # Queries out of place, to where they are contiguous; backward the other way.
        queries, apart = mixed[..., :heads, :], torch.empty_like(mixed[..., :heads, :])
        rope_kernel.rotate_into(queries, apart, angles, angles)
        rope_kernel.rotate_into(apart, queries, angles, angles, back=True)


def check(capability, kernel, cubin):
    """Nothing is kept in slow memory, where spilled registers go, and shared memory suffices."""
    assert kernel.metadata.enable_fp_fusion
    assert kernel.metadata.shared <= SHARED_MEMORY[capability]
    cubin.write_bytes(kernel.asm["cubin"])
    command = [CUOBJDUMP, "--dump-resource-usage", cubin]
    done = subprocess.run(command, capture_output=True, text=True)
    usage = re.findall(r"REG:\d+ STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", done.stdout)
    assert usage == [("0", "0")], done.stdout + done.stderr


@pytest.mark.parametrize(
    "name", ["megatron_ext.losses.head_triton", "benchmarks.candidate", "rotation"]
)
def test_every_launch_compiles_and_spills_nothing(compiled, name, tmp_path):
    capability, found = compiled
    dtype, columns = LOGITS[capability]
    if name == "rotation":
        launch_rotation(dtype)
    else:
        launch_head(importlib.import_module(name), dtype, columns)
    assert found
    for kernel_name, kernel in found:
        try:
            check(capability, kernel, tmp_path / "cubin")
        except AssertionError as error:
            raise AssertionError(f"{kernel_name}: {error}") from error
