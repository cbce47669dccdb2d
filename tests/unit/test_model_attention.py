"""Which of torch's attention kernels a GPU is asked for, found out without one."""

from contextlib import nullcontext

import pytest
import torch
from megatron.core.transformer.enums import AttnBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional

from megatron_ext.model.attention import _gpu_backends
from tests.helpers.attention import core_attention


def _asked_for(
    monkeypatch,
    *,
    dtype=torch.bfloat16,
    head_size=64,
    capability=(9, 0),
    cudnn=91900,
    chosen=AttnBackend.auto,
):
    """Shapes and backends of the attention of 8 query heads and 2 key heads on a GPU; no GPU is used."""
    attention = core_attention(chosen)
    seen = {}

    def record(query, key, value, *, enable_gqa, **_):
        seen["heads"] = query.shape[1], key.shape[1], value.shape[1]
        seen["grouped"] = enable_gqa
        return torch.empty_like(query)

    def backends(order, set_priority):
        assert set_priority
        seen["backends"] = [backend.name.split("_")[0] for backend in order]
        return nullcontext()

    monkeypatch.setattr(functional, "scaled_dot_product_attention", record)
    monkeypatch.setattr("megatron_ext.model.attention.sdpa_kernel", backends)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: cudnn)
    _gpu_backends.cache_clear()
    with FakeTensorMode():
        # Not torch.empty, which the CPU runtime, where a test has enabled it, takes to the CPU.
        query, key, value = (
            torch.ops.aten.empty.memory_format(
                [16, 1, heads, head_size], dtype=dtype, device="cuda"
            )
            for heads in (8, 2, 2)
        )
        assert attention(query, key, value).shape == (16, 1, 8 * head_size)
    _gpu_backends.cache_clear()
    return seen


@pytest.mark.parametrize(
    ("dtype", "head_size", "shared"),
    [(torch.bfloat16, 64, True), (torch.float32, 64, False), (torch.bfloat16, 320, False)],
)
def test_a_gpu_shares_key_heads_only_where_it_has_a_kernel(monkeypatch, dtype, head_size, shared):
    seen = _asked_for(monkeypatch, dtype=dtype, head_size=head_size)
    assert seen["heads"] == ((8, 2, 2) if shared else (8, 8, 8))
    assert seen["grouped"] == shared


@pytest.mark.parametrize(
    ("capability", "cudnn", "order"),
    [
        ((9, 0), 91900, ["CUDNN", "FLASH", "EFFICIENT"]),
        ((9, 0), 91002, ["FLASH", "EFFICIENT"]),
        ((9, 0), None, ["FLASH", "EFFICIENT"]),
        ((8, 0), 91900, ["FLASH", "EFFICIENT"]),
    ],
)
def test_cudnn_is_preferred_where_it_is_sound_and_faster(monkeypatch, capability, cudnn, order):
    seen = _asked_for(monkeypatch, capability=capability, cudnn=cudnn)
    assert seen["backends"] == order


@pytest.mark.parametrize(
    ("chosen", "capability", "order"),
    [
        (AttnBackend.flash, (9, 0), ["FLASH", "EFFICIENT"]),
        (AttnBackend.fused, (8, 0), ["CUDNN", "FLASH", "EFFICIENT"]),
        (AttnBackend.unfused, (9, 0), ["MATH"]),
    ],
)
def test_the_flag_chooses_the_kernels(monkeypatch, chosen, capability, order):
    assert _asked_for(monkeypatch, capability=capability, chosen=chosen)["backends"] == order
