"""Which of torch's attention kernels a GPU is asked for, found out without one."""

import itertools
from contextlib import nullcontext

import pytest
import torch
from megatron.core.transformer.enums import AttnBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from megatron_ext.model import kernel_choice
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

    def backends(order):
        seen["backends"] = [backend.name.split("_")[0] for backend in order]
        return nullcontext()

    monkeypatch.setattr(functional, "scaled_dot_product_attention", record)
    monkeypatch.setattr("megatron_ext.model.attention.only", backends)
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


KINDS = [kind for kind in SDPBackend.__members__.values() if kind is not SDPBackend.ERROR]


def _choice():
    """All that torch's attention looks at: by name whether it is on, and the order."""
    on = {name: getattr(torch._C, f"_get_{name}_sdp_enabled")() for name in kernel_choice._NAMES}
    return on, torch._C._get_sdp_priority_order()


@pytest.fixture
def changed_choice():
    """A process that has made a choice of its own; torch's default afterwards."""
    before, order = _choice()
    torch.backends.cuda.enable_mem_efficient_sdp(False)
    torch._C._set_sdp_priority_order([*order[1:], order[0]])
    yield _choice()
    torch.backends.cuda.enable_mem_efficient_sdp(before["mem_efficient"])
    torch._C._set_sdp_priority_order(order)
    assert _choice() == (before, order)


@pytest.mark.parametrize("known", [True, False])
def test_the_choice_is_that_of_torch_s_own_context(monkeypatch, changed_choice, known):
    assert kernel_choice.KNOWN
    monkeypatch.setattr(kernel_choice, "KNOWN", known)
    for count in (1, 2, 3):
        for kinds in itertools.permutations(KINDS, count):
            with sdpa_kernel([*kinds], set_priority=True):
                expected = _choice()
            with kernel_choice.only(kinds):
                found = _choice()
            assert found[0] == expected[0]
            # Beyond those that are on, the order is of no account.
            assert found[1][:count] == expected[1][:count] == [int(kind) for kind in kinds]
            assert sorted(found[1]) == sorted(expected[1])


def test_the_process_has_its_own_choice_back(changed_choice):
    kinds = SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION
    with kernel_choice.only(kinds):
        with kernel_choice.only((SDPBackend.MATH,)):  # as another layer's
            assert _choice()[0]["math"]
        assert not _choice()[0]["math"]
    assert _choice() == changed_choice
    with pytest.raises(ZeroDivisionError), kernel_choice.only(kinds):
        _ = 1 / 0
    assert _choice() == changed_choice


def test_without_math_a_call_that_only_math_computes_is_refused():
    """So no [s, s] is formed unasked; and others may still have it."""
    query = torch.randn(1, 2, 4, 8, requires_grad=True)
    mask = torch.zeros(4, 4).requires_grad_()  # no other kernel has its gradient
    attend = functional.scaled_dot_product_attention
    refused = pytest.raises(RuntimeError, match="available kernel")
    with refused, kernel_choice.only((SDPBackend.FLASH_ATTENTION,)):
        attend(query, query, query, attn_mask=mask)
    attend(query, query, query, attn_mask=mask).sum().backward()
    assert mask.grad is not None
