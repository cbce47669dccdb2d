"""The parts of the torch-native layers, each against a plain formula in fp64."""

import math
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional

from megatron_ext.exceptions import ConfigError
from megatron_ext.model.mlp import swiglu
from megatron_ext.model.norm import TorchNorm
from megatron_ext.model.rope import cos_sin, rotate, split_rotate
from tests.helpers.attention import core_attention
from tests.helpers.live_memory import LiveMemory

# (groups, query heads a group, head size, rotated part): plain, grouped, partly rotated, odd sizes.
LAYOUTS = [(4, 1, 8, 8), (2, 3, 8, 8), (1, 4, 10, 6), (3, 2, 12, 12)]


def naive_rotate(t, freqs):
    """`x cos + rotate_half(x) sin`, the usual text of RoPE, in the input's precision."""
    rot = freqs.shape[-1]
    angles = freqs[:, 0, 0].to(t.dtype)[:, None, None]
    x, rest = t[..., :rot], t[..., rot:]
    half = torch.cat((-x[..., rot // 2 :], x[..., : rot // 2]), dim=-1)
    return torch.cat((x * angles.cos() + half * angles.sin(), rest), dim=-1)


def _freqs(length, rot):
    angles = torch.outer(torch.arange(length), 100.0 ** -torch.linspace(0, 1, rot // 2))
    return torch.cat((angles, angles), dim=-1)[:, None, None]


@pytest.mark.parametrize("turned", [True, False])
@pytest.mark.parametrize(("groups", "heads", "size", "rot"), LAYOUTS)
def test_split_and_rotate_equal_the_formula_forward_and_backward(groups, heads, size, rot, turned):
    torch.manual_seed(0)
    s, b = 5, 2
    freqs = _freqs(s, rot)
    source = torch.randn(s, b, groups * (heads + 2) * size, requires_grad=True)
    angles = cos_sin(freqs) if turned else (None, None)
    parts = split_rotate(source * 1.0, *angles, groups=groups, heads=heads)

    exact = source.detach().double().requires_grad_()
    q, k, v = exact.view(s, b, groups, heads + 2, size).split((heads, 1, 1), dim=3)
    expected = [q.flatten(2, 3), k[:, :, :, 0], v[:, :, :, 0]]
    if turned:
        expected[:2] = (naive_rotate(part, freqs) for part in expected[:2])
    weights = [torch.randn_like(part) for part in parts]
    sum((p * w).sum() for p, w in zip(parts, weights, strict=True)).backward()
    sum((e * w).sum() for e, w in zip(expected, weights, strict=True)).backward()

    for part, want in zip(parts, expected, strict=True):
        torch.testing.assert_close(part.double(), want, rtol=0, atol=2e-6)
    torch.testing.assert_close(source.grad.double(), exact.grad, rtol=0, atol=2e-6)


@pytest.mark.parametrize("turned", [True, False])
@pytest.mark.parametrize(("groups", "heads", "size", "rot"), LAYOUTS)
def test_queries_keys_and_values_are_kept_once(groups, heads, size, rot, turned):
    """And backward makes one gradient of the projection, and nothing else."""
    s, b = 64, 2
    whole = s * b * groups * (heads + 2) * size * 4
    source = torch.randn(s, b, groups * (heads + 2) * size, requires_grad=True)
    angles = cos_sin(_freqs(s, rot)) if turned else (None, None)
    with LiveMemory() as memory:
        parts = split_rotate(source * 1.0, *angles, groups=groups, heads=heads)
        kept = memory.now
        grads = [torch.ones_like(part) for part in parts]
        before = memory.now
        memory.peak = before
        gradient = torch.autograd.grad(parts, source, grads)
        after = memory.now
    assert kept == whole
    assert gradient[0].shape == source.shape
    # Beside it only the gradient of `source`, made of it.
    assert (after - before, memory.peak - before) == (whole, 2 * whole)


def test_rotate_leaves_its_input_and_has_the_opposite_rotation_as_gradient():
    torch.manual_seed(0)
    freqs = _freqs(6, 8)
    t = torch.randn(6, 2, 3, 8, requires_grad=True)
    before = t.detach().clone()
    out = rotate(t, *cos_sin(freqs))
    torch.testing.assert_close(out, naive_rotate(before, freqs), rtol=0, atol=1e-6)
    torch.testing.assert_close(t.detach(), before, rtol=0, atol=0)
    out.backward(out.detach())  # an orthogonal map: its transpose undoes it
    torch.testing.assert_close(t.grad, before, rtol=0, atol=2e-6)


def test_half_precision_is_rotated_in_fp32():
    """Rounded once: never further from the truth than the formula in half precision throughout."""
    torch.manual_seed(0)
    freqs = _freqs(64, 16)
    t = torch.randn(64, 2, 4, 16).bfloat16()
    exact = naive_rotate(t.double(), freqs)
    ours = (rotate(t, *cos_sin(freqs)).double() - exact).abs()
    usual = (naive_rotate(t, freqs).double() - exact).abs()
    assert (ours <= exact.abs() * 2**-8 + 1e-30).all(), "more than one rounding"
    assert ours.mean() < usual.mean()


def test_scaled_angles_are_not_mixed_up_by_the_cache():
    freqs = _freqs(4, 8)
    plain, scaled = cos_sin(freqs), cos_sin(freqs, scale=2.0)
    torch.testing.assert_close(scaled[0], 2 * plain[0])
    torch.testing.assert_close(cos_sin(freqs)[1], plain[1])
    with torch.inference_mode():
        fresh = _freqs(4, 8)
        cos_sin(fresh)
    assert not cos_sin(fresh)[0].is_inference(), "cached from inference mode"


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


KERNEL = """
import torch
from megatron_ext.model import rope, rope_kernel
assert rope_kernel._INTERPRETED
torch.manual_seed(0)
LAYOUTS = ((4, 1, 8, 8), (2, 3, 24, 16), (1, 2, 20, 12), (33, 2, 130, 130))
# A whole unit in bf16: the interpreter cuts the last bits off where a GPU rounds.
for dtype, rounding in ((torch.float32, 0.0), (torch.bfloat16, 2**-7)):
    for groups, heads, size, rot in LAYOUTS:
        t = torch.randn(3, 2, groups, heads + 2, size).to(dtype)
        angles = torch.randn(3, rot // 2)
        exact, kernel = t.double(), t.clone()
        cos, sin = angles.cos(), angles.sin()
        part = exact[..., : heads + 1, :]
        rope._rotate_eager(part, part, cos.double(), sin.double())
        part = kernel[..., : heads + 1, :]
        rope_kernel.rotate_into(part, part, cos, sin)
        torch.testing.assert_close(kernel.double(), exact, rtol=rounding, atol=2e-6)
        # Out of place, between two layouts.
        out = torch.full((3, 2, heads, groups, size + 3), torch.nan).to(dtype).transpose(2, 3)
        out = out[..., :size]
        rope.rotate_into(t[..., :heads, :], out, cos, sin)
        torch.testing.assert_close(out, kernel[..., :heads, :], rtol=0, atol=0)
        assert (kernel[..., -1, :] == t[..., -1, :]).all(), "values were touched"
        assert (kernel != t).any()
"""


def test_the_triton_kernel_equals_the_eager_rotation():
    pytest.importorskip("triton")
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", KERNEL], check=True, env=environment)


def test_the_triton_kernel_compiles_for_hopper():
    """The interpreter accepts code that the compiler refuses; this needs no GPU."""
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget

    from megatron_ext.model.rope_kernel import _rotate_kernel

    constants = {"HALF": 32, "ROWS": 64, "COLUMNS": 32, "TOTAL_HEADS": 64}
    types = {name: "constexpr" if name in constants else "i32" for name in _rotate_kernel.arg_names}
    types |= {"t_ptr": "*bf16", "out_ptr": "*bf16", "cos_ptr": "*fp32", "sin_ptr": "*fp32"}
    source = triton.compiler.ASTSource(fn=_rotate_kernel, signature=types, constexprs=constants)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32))
    assert compiled.asm["cubin"]


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
