"""The torch-native experts by themselves: gradients into Megatron's buffers, rounding, hooks, refusals.

Loss and gradients of models are compared with Megatron's in tests/distributed/test_model_spec.py.
"""

from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional

from megatron_ext.exceptions import ConfigError
from megatron_ext.model.experts import TorchExperts, _AtOnce, check_grouped, weighted_swiglu
from tests.helpers.live_memory import LiveMemory

HIDDEN, WIDTH = 16, 24
ROWS = torch.tensor([5, 0, 9])


class _Linear(torch.nn.Module):
    def __init__(self, outputs, inputs):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(outputs, inputs))


class _Experts(TorchExperts):
    """Experts without Megatron's process groups; only what `forward` reads."""

    def __init__(self, **changes):
        torch.nn.Module.__init__(self)
        config = {
            **{
                "gated_linear_unit": True,
                "activation_func": functional.silu,
                "glu_linear_offset": 0.0,
            },
            **{"activation_func_clamp_value": None, "activation_func_fp8_input_store": False},
            **{"moe_apply_probs_on_input": False, "moe_grouped_gemm": False},
            **{"gradient_accumulation_fusion": False, "recompute_granularity": None},
        }
        self.config = SimpleNamespace(**config | changes)
        torch.manual_seed(1)
        self.local_experts = torch.nn.ModuleList()
        for _ in ROWS:
            expert = torch.nn.Module()
            expert.linear_fc1 = _Linear(2 * WIDTH, HIDDEN)
            expert.linear_fc2 = _Linear(HIDDEN, WIDTH)
            self.local_experts.append(expert)


def _inputs(rows=ROWS, dtype=torch.float32):
    generator = torch.Generator().manual_seed(2)
    total = int(rows.sum())
    hidden = torch.randn(total, HIDDEN, generator=generator).to(dtype).requires_grad_()
    return hidden, rows, torch.rand(total, generator=generator, requires_grad=True)


def _gradients(experts):
    return [parameter.grad for parameter in experts.parameters()]


@pytest.fixture(scope="module")
def expected():
    """Gradients of the sum of squares, by autograd alone."""
    experts = _Experts()
    hidden, rows, probs = _inputs()
    parts = zip(
        hidden.split(rows.tolist()), probs.split(rows.tolist()), experts.local_experts, strict=True
    )
    outs = []
    for part, prob, expert in parts:
        gate, linear = (part @ expert.linear_fc1.weight.t()).chunk(2, dim=-1)
        activated = functional.silu(gate) * linear * prob[:, None]
        outs.append(activated @ expert.linear_fc2.weight.t())
    torch.cat(outs).square().sum().backward()
    return [hidden.grad, probs.grad, *_gradients(experts)]


@pytest.mark.parametrize("grouped", [False, True])
def test_gradients_are_those_of_autograd(grouped, expected):
    experts = _Experts(moe_grouped_gemm=grouped)
    hidden, rows, probs = _inputs()
    experts(hidden, rows, probs)[0].square().sum().backward()
    torch.testing.assert_close([hidden.grad, probs.grad, *_gradients(experts)], expected)
    assert not _gradients(experts)[2].any()  # an expert without tokens


def test_what_a_kernel_leaves_in_the_gradient_of_an_idle_expert_does_not_count(
    monkeypatch, expected
):
    multiply = functional.grouped_mm

    def careless(left, right, *, offs):
        out = multiply(left, right, offs=offs)
        if out.dim() == 3:
            out[1] = torch.nan
        return out

    monkeypatch.setattr(functional, "grouped_mm", careless)
    experts = _Experts(moe_grouped_gemm=True)
    hidden, rows, probs = _inputs()
    experts(hidden, rows, probs)[0].square().sum().backward()
    torch.testing.assert_close(_gradients(experts), expected[2:])


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("zeros", [False, True])
def test_fused_gradients_are_added_to_megatrons_buffers(zeros, grouped, expected):
    experts = _Experts(gradient_accumulation_fusion=True, moe_grouped_gemm=grouped)
    for parameter in experts.parameters():
        parameter.main_grad = torch.ones_like(parameter)
        parameter.grad_added_to_main_grad = False
        parameter.zero_out_wgrad = zeros
    hidden, rows, probs = _inputs()
    experts(hidden, rows, probs)[0].square().sum().backward()
    assert all(parameter.grad_added_to_main_grad for parameter in experts.parameters())
    added = [parameter.main_grad - 1 for parameter in experts.parameters()]
    torch.testing.assert_close(added, expected[2:], rtol=1e-5, atol=1e-4)
    assert all(not gradient.any() for gradient in _gradients(experts)) or not zeros


def test_fused_gradients_of_one_product_are_summed_in_fp32():
    """Rounded to bf16 on their way, they would each be off by up to 2^-9, and so would be their sum."""
    generator = torch.Generator().manual_seed(4)
    weights = [torch.randn(WIDTH, HIDDEN, generator=generator).bfloat16() for _ in ROWS]
    rows, exact, errors = ROWS.tolist(), [torch.zeros(WIDTH, HIDDEN).double() for _ in ROWS], {}
    inputs = []
    for _ in range(8):
        shapes = (int(ROWS.sum()), HIDDEN), (int(ROWS.sum()), WIDTH)
        inputs.append([torch.randn(shape, generator=generator).bfloat16() for shape in shapes])
        pairs = zip(*(t.double().split(rows) for t in inputs[-1]), strict=True)
        for total, (x, grad) in zip(exact, pairs, strict=True):
            total += grad.t() @ x
    for fused in (True, False):
        parameters = [weight.clone().requires_grad_() for weight in weights]
        for parameter in parameters:
            parameter.main_grad = torch.zeros(WIDTH, HIDDEN)
            parameter.grad_added_to_main_grad = False
        for x, grad in inputs:
            _AtOnce.apply(x, ROWS, rows if fused else None, *parameters).backward(grad)
            for parameter in parameters:
                if not parameter.grad_added_to_main_grad:  # as DDP does
                    parameter.main_grad += parameter.grad
                parameter.grad = None
        assert {p.grad_added_to_main_grad for p in parameters} == {fused}
        sums = torch.stack([parameter.main_grad for parameter in parameters]).double()
        errors[fused] = float((sums - torch.stack(exact)).norm() / torch.stack(exact).norm())
    # Products of bf16 are exact in fp32, and 72 of them are summed.
    assert errors[True] < 1e-6
    assert errors[False] > 1e-4


def test_fused_gradients_take_no_more_memory_than_others():
    """Of each weight a throwaway, by which autograd calls its hooks, in place of the gradient."""
    peaks = {}
    for fuse in (False, True):
        experts = _Experts(moe_grouped_gemm=True, gradient_accumulation_fusion=fuse)
        for parameter in experts.parameters():
            parameter.main_grad = torch.zeros_like(parameter)
            parameter.grad_added_to_main_grad = False
        out = experts(*_inputs())[0]
        grad = torch.ones_like(out)
        with LiveMemory() as memory:
            out.backward(grad)
        peaks[fuse] = memory.peak
    assert peaks[True] <= peaks[False]


@pytest.mark.parametrize("grouped", [False, True])
def test_frozen_experts_pass_gradients_on_and_get_none(grouped, expected):
    experts = _Experts(moe_grouped_gemm=grouped).requires_grad_(False)
    hidden, rows, probs = _inputs()
    experts(hidden, rows, probs)[0].square().sum().backward()
    torch.testing.assert_close([hidden.grad, probs.grad], expected[:2])
    assert _gradients(experts) == [None] * 6


@pytest.mark.parametrize("grouped", [False, True])
def test_a_rank_may_get_no_tokens(grouped):
    experts = _Experts(moe_grouped_gemm=grouped)
    hidden, rows, probs = _inputs(torch.zeros(3, dtype=torch.int64))
    out, _ = experts(hidden, rows, probs)
    assert out.shape == (0, HIDDEN)
    out.sum().backward()
    assert all(gradient is not None and not gradient.any() for gradient in _gradients(experts))


def test_hooks_run_before_a_weight_is_read():
    experts = _Experts()
    seen = []
    for expert in experts.local_experts:
        for linear in (expert.linear_fc1, expert.linear_fc2):
            linear.register_forward_pre_hook(lambda module, _: seen.append(module))
    experts(*_inputs())
    assert len({*map(id, seen)}) == len(seen) == 6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_activation_is_as_exact_as_its_type(dtype):
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(64, 2 * WIDTH, generator=generator).to(dtype)
    weights = torch.rand(64, generator=generator)
    grad = torch.randn(64, WIDTH, generator=generator).to(dtype)

    inputs = [x.clone().requires_grad_(), weights.clone().requires_grad_()]
    out = weighted_swiglu(*inputs)
    out.backward(grad)
    assert (out.dtype, inputs[1].grad.dtype) == (dtype, torch.float32)
    exact = [x.double().requires_grad_(), weights.double().requires_grad_()]
    gate, linear = exact[0].chunk(2, dim=-1)
    expected = functional.silu(gate) * linear * exact[1][:, None]
    expected.backward(grad.double())
    pairs = [(out, expected), *((a.grad, b.grad) for a, b in zip(inputs, exact, strict=True))]
    for ours, theirs in pairs:  # at most four roundings, of eps / 2 each
        assert (ours.double() - theirs).norm() / theirs.norm() < 2 * torch.finfo(dtype).eps


def _config(**changes):
    sizes = {"hidden_size": 64, "moe_ffn_hidden_size": 48, "expert_tensor_parallel_size": 1}
    kind = {"num_moe_experts": 4, "moe_grouped_gemm": True, "params_dtype": torch.bfloat16}
    kind["moe_token_dispatcher_type"] = "alltoall"
    return SimpleNamespace(**vars(_Experts().config) | sizes | kind | changes)


def test_sizes_that_the_grouped_product_does_not_take_are_named():
    check_grouped(_config())
    check_grouped(_config(hidden_size=60, moe_grouped_gemm=False))
    check_grouped(_config(hidden_size=60, params_dtype=torch.float32))
    with pytest.raises(ConfigError, match=r"--hidden-size: .* multiple of 8 .*found 60"):
        check_grouped(_config(hidden_size=60))
    with pytest.raises(ConfigError, match=r"--moe-ffn-hidden-size: .* multiple of 8 .*found 12"):
        check_grouped(_config(expert_tensor_parallel_size=4))
    with pytest.raises(ConfigError, match=r"--moe-grouped-gemm: .* --swiglu"):
        check_grouped(_config(activation_func=functional.gelu))
    with pytest.raises(ConfigError, match=r"--moe-token-dispatcher-type: .* found flex"):
        check_grouped(_config(moe_token_dispatcher_type="flex"))
