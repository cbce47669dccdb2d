"""The torch-native layers on a GPU: kernels, chosen attention, bf16 against an fp64 reference."""

import itertools

import pytest
import torch
from torch.nn import functional
from torch.profiler import ProfilerActivity, profile

from megatron_ext.model.documents import Documents
from megatron_ext.model.rope import cos_sin, split_rotate
from megatron_ext.runtime import optimizer as kernels
from tests.helpers.attention import core_attention
from tests.unit.test_model_rope import LAYOUTS, _freqs, naive_rotate

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def _error(found, exact):
    return float((found.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize(("groups", "heads", "size", "rot"), [*LAYOUTS, (32, 1, 64, 64)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rotation_kernel_forward_and_backward(groups, heads, size, rot, dtype):
    torch.manual_seed(0)
    s, b = 65, 2
    freqs = _freqs(s, rot).cuda()
    source = torch.randn(s, b, groups * (heads + 2) * size, device="cuda").to(dtype)
    source.requires_grad_()
    parts = split_rotate(source * 1.0, *cos_sin(freqs), groups=groups, heads=heads)
    exact = source.detach().double().requires_grad_()
    q, k, v = exact.view(s, b, groups, heads + 2, size).split((heads, 1, 1), dim=3)
    expected = [naive_rotate(t.flatten(2, 3), freqs) for t in (q, k)] + [v.flatten(2, 3)]
    weights = [torch.randn_like(part) for part in parts]
    sum((p * w).sum() for p, w in zip(parts, weights, strict=True)).backward()
    sum((e * w).sum() for e, w in zip(expected, weights, strict=True)).backward()
    bound = 1e-6 if dtype == torch.float32 else 2**-8  # one rounding to bf16
    for part, want in zip(parts, expected, strict=True):
        assert _error(part, want) < bound
    assert _error(source.grad, exact.grad) < bound


def _attention(query_heads, groups, size, dtype=torch.bfloat16):
    s, b = 256, 2
    # The layout that split_rotate leaves of one query head a group: views of one buffer, a value between
    # two keys. That of several is contiguous.
    buffer = torch.randn(s, b, groups, query_heads // groups + 2, size, device="cuda")
    buffer = buffer.to(dtype).requires_grad_()
    parts = buffer.split((query_heads // groups, 1, 1), dim=3)
    return core_attention(), buffer, [part.flatten(2, 3) for part in parts]


@pytest.mark.parametrize(("query_heads", "groups", "size"), [(8, 8, 64), (8, 2, 64), (4, 4, 128)])
def test_attention_is_as_exact_as_bf16_allows_and_holds_no_score_matrix(query_heads, groups, size):
    torch.manual_seed(0)
    attention, buffer, parts = _attention(query_heads, groups, size)
    exact = [p.detach().double().permute(1, 2, 0, 3).requires_grad_() for p in parts]
    want = functional.scaled_dot_product_attention(
        *exact, is_causal=True, enable_gqa=query_heads != groups
    )
    weight = torch.randn_like(want)
    (want * weight).sum().backward()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        found = attention(*parts)
        (found * weight.permute(2, 0, 1, 3).flatten(2).bfloat16()).sum().backward()
    names = {event.key for event in profiler.key_averages()}
    assert not any("attention_math" in name for name in names), names
    assert _error(found, want.permute(2, 0, 1, 3).flatten(2)) < 1e-2
    heads = query_heads // groups
    gradient = torch.cat(
        [
            e.grad.permute(2, 0, 1, 3).unflatten(2, (groups, n))
            for e, n in zip(exact, (heads, 1, 1), strict=True)
        ],
        dim=3,
    )
    assert _error(buffer.grad, gradient) < 2e-2


def test_grouped_attention_runs_in_fp32_and_holds_no_score_matrix():
    torch.manual_seed(0)
    attention, buffer, parts = _attention(8, 2, 64, torch.float32)
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        found = attention(*parts)
        found.sum().backward()
    names = {event.key for event in profiler.key_averages()}
    assert not any("attention_math" in name for name in names), names
    exact = [p.detach().double().permute(1, 2, 0, 3) for p in parts]
    want = functional.scaled_dot_product_attention(*exact, is_causal=True, enable_gqa=True)
    assert _error(found, want.permute(2, 0, 1, 3).flatten(2)) < 1e-3  # TF32 may be allowed
    assert bool(buffer.grad.isfinite().all())


def test_weight_gradient_accumulates_in_fp32_in_place():
    torch.manual_seed(0)
    inputs = torch.randn(512, 96, device="cuda").bfloat16()
    grad_output = torch.randn(512, 160, device="cuda").bfloat16()
    main_grad = torch.randn(160, 96, device="cuda")
    pointer = main_grad.data_ptr()
    exact = main_grad.double() + grad_output.double().t() @ inputs.double()
    kernels._WeightGradient.wgrad_gemm_accum_fp32(inputs, grad_output, main_grad)
    assert main_grad.data_ptr() == pointer
    # Products of bf16 are exact in fp32; rounding the sum to bf16 instead would leave 2e-3.
    assert _error(main_grad, exact) < 1e-5


def test_fused_adam_runs_on_the_device():
    parameter = torch.randn(1000, device="cuda", requires_grad=True)
    twin = parameter.detach().clone().requires_grad_()
    ours, plain = torch.optim.AdamW([parameter], lr=1e-2), torch.optim.AdamW([twin], lr=1e-2)
    for _ in range(4):
        parameter.grad = torch.randn_like(parameter)
        twin.grad = parameter.grad.clone()
        assert kernels.use_fused_adam(ours)
        ours.step()
        plain.step()
    torch.testing.assert_close(parameter, twin, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("query_heads", "groups", "size"), [(8, 8, 64), (8, 2, 64), (4, 4, 128)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_within_documents_is_that_of_each_by_itself(query_heads, groups, size, dtype):
    """In bf16 by the flash kernel for many lengths, in fp32 document by document."""
    torch.manual_seed(0)
    attention, buffer, parts = _attention(query_heads, groups, size, dtype)
    ends = [[1, 70, 256], [256]]
    lengths = torch.full((2, 257), 256, dtype=torch.int32)
    lengths[:, 0] = 0
    lengths[0, 1:4] = torch.tensor(ends[0])
    weight = torch.randn(256, 2, query_heads * size, device="cuda").to(dtype)
    found = attention(*parts, packed_seq_params=Documents.from_lengths(lengths))
    (found * weight).sum().backward()
    gradient, buffer.grad = buffer.grad, None
    exact = buffer.detach().double().requires_grad_()
    heads = query_heads // groups
    whole = [part.flatten(2, 3) for part in exact.split((heads, 1, 1), dim=3)]
    samples = []
    for sample, own in enumerate(ends):
        alone = slice(sample, sample + 1)
        documents = [
            functional.scaled_dot_product_attention(
                *(part[start:end, alone].permute(1, 2, 0, 3) for part in whole),
                is_causal=True,
                enable_gqa=query_heads != groups,
            ).permute(2, 0, 1, 3)
            for start, end in itertools.pairwise((0, *own))
        ]
        samples.append(torch.cat(documents).flatten(2))
    want = torch.cat(samples, dim=1)
    (want * weight.double()).sum().backward()
    bounds = (1e-2, 2e-2) if dtype == torch.bfloat16 else (1e-5, 1e-5)
    assert _error(found, want) < bounds[0]
    assert _error(gradient, exact.grad) < bounds[1]
