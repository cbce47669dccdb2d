"""The rotation of queries and keys: against the usual formula in fp64, its kernel, what it keeps."""

import os
import subprocess
import sys

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_ext.model.rope import cos_sin, rotate, rotate_into, split_rotate
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_opposite_rotation_is_the_one_by_negated_sines(dtype):
    """Bit for bit."""
    torch.manual_seed(0)
    cos, sin = cos_sin(_freqs(6, 8))
    t = torch.randn(6, 2, 3, 2, 10).to(dtype)
    turned, expected = torch.empty_like(t), torch.empty_like(t)
    rotate_into(t, turned, cos, sin, back=True)
    rotate_into(t, expected, cos, -sin)
    torch.testing.assert_close(turned, expected, rtol=0, atol=0)
    assert (turned[..., :4] != t[..., :4]).any()


class _Operators(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("heads", [1, 3])
def test_a_backward_pass_negates_no_sines(heads):
    """It would be a launch for each layer."""
    angles = cos_sin(_freqs(6, 8))
    mixed = torch.randn(6, 2, 2 * (heads + 2) * 8, requires_grad=True)
    parts = [*split_rotate(mixed * 1.0, *angles, groups=2, heads=heads)]
    parts.append(rotate(parts[0], *angles))
    grads = [torch.ones_like(part) for part in parts]
    with _Operators() as seen:
        torch.autograd.backward(parts, grads)
    assert "mul" in seen.names
    assert "neg" not in seen.names


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
        rope._rotate_eager(part, part, cos.double(), sin.double(), back=False)
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
        # By the opposite angle: bit for bit that of negated sines.
        turned, expected = torch.empty_like(part), torch.empty_like(part)
        rope.rotate_into(part, turned, cos, sin, back=True)
        rope.rotate_into(part, expected, cos, -sin)
        torch.testing.assert_close(turned, expected, rtol=0, atol=0)
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

    constants = {"HALF": 32, "ROWS": 64, "COLUMNS": 32, "TOTAL_HEADS": 64, "BACK": True}
    types = {name: "constexpr" if name in constants else "i32" for name in _rotate_kernel.arg_names}
    types |= {"t_ptr": "*bf16", "out_ptr": "*bf16", "cos_ptr": "*fp32", "sin_ptr": "*fp32"}
    source = triton.compiler.ASTSource(fn=_rotate_kernel, signature=types, constexprs=constants)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32))
    assert compiled.asm["cubin"]
