"""The parts of the torch-native layers but the rotation, each against a plain formula in fp64."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional

from megatron_ext.exceptions import ConfigError
from megatron_ext.model.mlp import swiglu
from megatron_ext.model.norm import TorchNorm
from tests.helpers.attention import core_attention


class _OnGpu(torch.Tensor):
    """A tensor of the CPU that says that it is on a GPU."""

    is_cuda = True


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_grouped_heads_in_fp32_are_repeated_for_the_kernels_of_a_gpu(dtype, monkeypatch):
    """On a GPU torch's fp32 kernels refuse grouped heads; those of half precision take them."""
    torch.manual_seed(0)
    attention = core_attention()
    parts = [torch.randn(6, 2, heads, 8).to(dtype) for heads in (6, 2, 2)]
    want = attention(*parts)
    grouped = []
    attend = functional.scaled_dot_product_attention

    def watch(query, key, value, **options):
        grouped.append((key.shape[1], value.shape[1], options["enable_gqa"]))
        return attend(query, key, value, **options)

    monkeypatch.setattr(functional, "scaled_dot_product_attention", watch)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    found = attention(*(part.as_subclass(_OnGpu) for part in parts))
    assert grouped == [(6, 6, False) if dtype == torch.float32 else (2, 2, True)]
    torch.testing.assert_close(found.as_subclass(torch.Tensor), want)


def _norm_config(**changes):
    plain = {
        "normalization": "RMSNorm",
        "layernorm_zero_centered_gamma": False,
        "sequence_parallel": True,
    }
    return SimpleNamespace(**(plain | changes))


def _naive_norm(x, norm, *, centred):
    x, weight = x.double(), norm.weight.double()
    if norm.bias is not None:
        x = x - x.mean(-1, keepdim=True)
    x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5)
    x = x * (weight + 1 if centred else weight)
    return x if norm.bias is None else x + norm.bias.double()


@pytest.mark.parametrize("kind", ["RMSNorm", "LayerNorm"])
@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize(
    ("inputs", "parameters"),
    [
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.bfloat16),
        (torch.float32, torch.bfloat16),  # fp32_residual_connection
    ],
)
def test_norm_equals_the_formula(kind, centred, inputs, parameters):
    torch.manual_seed(0)
    config = _norm_config(normalization=kind, layernorm_zero_centered_gamma=centred)
    norm = TorchNorm(config, 64)
    assert torch.equal(norm.weight, torch.full((64,), 0.0 if centred else 1.0))
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter.add_(torch.randn(64) * 0.3)
    norm.to(parameters)
    x = (torch.randn(16, 64) * 3).to(inputs)
    out = norm(x)
    assert out.dtype == parameters
    # In bf16 one rounding of the result, and none of `weight + 1`.
    rtol, atol = (1.01 * 2**-8, 1e-6) if parameters == torch.bfloat16 else (1e-5, 1e-5)
    exact = _naive_norm(x, norm, centred=centred)
    torch.testing.assert_close(out.double(), exact, rtol=rtol, atol=atol)


def test_norm_parameters_carry_the_mark_of_sequence_parallelism():
    for value in (True, False):
        norm = TorchNorm(_norm_config(normalization="LayerNorm", sequence_parallel=value), 8)
        assert [p.sequence_parallel for p in norm.parameters()] == [value, value]


@pytest.mark.parametrize("kind", ["RMSNorm", "LayerNorm"])
def test_a_norm_of_heads_keeps_no_copy_of_them_on_a_gpu(kind):
    """Queries that lie in groups between keys and values; found out without a GPU."""
    norm = TorchNorm(_norm_config(normalization=kind), 16).bfloat16()
    kept = []

    def keep(t):
        kept.append(t)
        return t

    with FakeTensorMode():
        # Not torch.empty, which the CPU runtime, where a test has enabled it, takes to the CPU.
        size = [8, 2, 2, 5, 16]
        make = torch.ops.aten.empty.memory_format
        mixed = make(size, dtype=torch.bfloat16, device="cuda").requires_grad_()
        for name, _ in [*norm.named_parameters()]:
            fake = make([16], dtype=torch.bfloat16, device="cuda")
            setattr(norm, name, torch.nn.Parameter(fake))
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            out = norm(mixed[..., :3, :])
    assert out.is_cuda
    places = {t.untyped_storage()._cdata for t in kept if t.dtype == torch.bfloat16 and t.dim() > 1}
    assert places == {mixed.untyped_storage()._cdata}


def test_unknown_norm_is_refused():
    with pytest.raises(ConfigError, match="RMSNorm and LayerNorm; found 'L2Norm'"):
        TorchNorm(_norm_config(normalization="L2Norm"), 8)


def test_swiglu_gradient_is_that_of_autograd():
    torch.manual_seed(0)
    x = torch.randn(3, 2, 10, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(swiglu, (x,))
    gate, linear = x.detach().chunk(2, dim=-1)
    torch.testing.assert_close(swiglu(x).detach(), functional.silu(gate) * linear)


def test_swiglu_of_extreme_gates_is_finite():
    gate = torch.tensor([-1e4, -100.0, 0.0, 100.0, 1e4])
    x = torch.cat((gate, torch.ones(5))).requires_grad_()
    swiglu(x).sum().backward()
    assert torch.isfinite(x.grad).all()
    assert math.isclose(x.grad[2].item(), 0.5)
