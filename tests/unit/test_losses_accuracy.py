"""Values and gradients of the losses against fp64 on the same inputs."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from megatron_ext import losses
from tests.helpers import naive
from tests.helpers.loss_cases import (
    Case,
    accuracy_case,
    accuracy_cases,
    hostile_cases,
    poisoned,
    spoilt,
)

CASES = {case.name: case for case in [*accuracy_cases(), *hostile_cases()]}
DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")],
    ),
]
FP32_MAX = torch.finfo(torch.float32).max


@pytest.fixture(params=list(CASES))
def case(request) -> Case:
    return CASES[request.param]


def gradient(fn: Callable[[Tensor], Tensor], logits: Tensor) -> Tensor:
    """Gradient of the sum of `fn(logits)`, in the type of `logits`."""
    leaf = logits.detach().clone().requires_grad_()
    return torch.autograd.grad(fn(leaf).sum(), leaf)[0]


@pytest.mark.parametrize("device", DEVICES)
def test_values(case: Case, device: str) -> None:
    margin, kl = losses.unlearning_terms(
        case.logits.to(device),
        case.labels.to(device),
        reference_logits=case.reference.to(device),
        vocab_size=case.vocab_size,
    )
    assert margin.dtype == kl.dtype == torch.float32
    truth = naive.target_margin(case.logits, case.labels, vocab_size=case.vocab_size)
    truth = truth.clamp(-FP32_MAX, FP32_MAX)
    bound = naive.tolerance(truth)
    naive.assert_values(margin.cpu(), truth, bound, floor=1.0)
    for name, objective in naive.OBJECTIVES.items():
        value = getattr(losses, name)(margin).cpu()
        naive.assert_values(value, objective(truth), bound)
    true_kl = naive.reference_kl(case.logits, case.reference, vocab_size=case.vocab_size)
    assert (kl >= 0).all()
    naive.assert_values(kl.cpu(), true_kl.clamp(0, FP32_MAX), 1e-5, floor=1e-3)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", list(naive.OBJECTIVES))
def test_objective_gradient(case: Case, name: str, device: str) -> None:
    labels, vocab_size = case.labels.to(device), case.vocab_size

    def product(z: Tensor) -> Tensor:
        return getattr(losses, name)(losses.target_margin(z, labels, vocab_size=vocab_size))

    def truth(z: Tensor) -> Tensor:
        return naive.OBJECTIVES[name](naive.target_margin(z, case.labels, vocab_size=vocab_size))

    margin = naive.target_margin(case.logits, case.labels, vocab_size=vocab_size)
    # fp32 leaves with the very same numbers show the gradient before its rounding to bf16.
    actual = gradient(product, case.logits.float().to(device))
    naive.assert_gradient(
        actual.cpu(), gradient(truth, case.logits.double()), naive.tolerance(margin)
    )
    assert (actual[:, vocab_size:] == 0).all()
    rounded = gradient(product, case.logits.to(device))
    assert rounded.dtype == case.logits.dtype
    assert torch.equal(rounded, actual.to(rounded.dtype))


@pytest.mark.parametrize("device", DEVICES)
def test_kl_gradient(case: Case, device: str) -> None:
    reference, vocab_size = case.reference.to(device), case.vocab_size

    def product(z: Tensor) -> Tensor:
        return losses.reference_kl(z, reference, vocab_size=vocab_size)

    actual = gradient(product, case.logits.float().to(device))
    expected = gradient(
        lambda z: naive.reference_kl(z, case.reference, vocab_size=vocab_size),
        case.logits.double(),
    )
    noise = naive.divergence_noise(case.logits[:, :vocab_size])
    naive.assert_gradient(actual.cpu(), expected, 1e-5, noise=noise)
    assert (actual[:, vocab_size:] == 0).all()
    rounded = gradient(product, case.logits.to(device))
    assert torch.equal(rounded, actual.to(rounded.dtype))


@pytest.mark.parametrize("name", ["KL 1e-7", "KL 1e-11", "offset 1e4"])
def test_small_kl_keeps_its_digits(name: str) -> None:
    case = CASES[name]
    kl = losses.reference_kl(case.logits, case.reference, vocab_size=case.vocab_size)
    truth = naive.reference_kl(case.logits, case.reference, vocab_size=case.vocab_size)
    naive.assert_values(kl, truth, 1e-5, noise=naive.TRUTH_NOISE)


def test_reference_equal_to_student_gives_zero() -> None:
    case = CASES["reference is student"]
    logits = case.logits.clone().requires_grad_()
    kl = losses.reference_kl(logits, case.reference, vocab_size=case.vocab_size)
    kl.sum().backward()
    assert (kl <= naive.TRUTH_NOISE).all()
    assert (logits.grad.abs().sum(-1) <= naive.TRUTH_NOISE).all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_finite_logits_give_finite_results(dtype: torch.dtype, device: str) -> None:
    largest = torch.finfo(dtype).max
    values = torch.tensor([largest, -largest, 1e30, -1e30, 1e4, -1e4, 0.0], dtype=dtype)
    rng = torch.Generator().manual_seed(0)
    picks = torch.randint(0, len(values), (2, 500, 9), generator=rng)
    picks[:, :49] = torch.stack([torch.arange(49) % 7, torch.arange(49) // 7])[..., None]
    logits, reference = values[picks].to(device)
    logits.requires_grad_()
    labels = torch.randint(0, 9, (500,), generator=rng).to(device)
    terms = losses.unlearning_terms(logits, labels, reference_logits=reference)
    for value in (*(getattr(losses, n)(terms.margin) for n in naive.OBJECTIVES), *terms):
        assert value.isfinite().all()
        (slope,) = torch.autograd.grad(value.sum(), logits, retain_graph=True)
        assert slope.isfinite().all()


def test_terms_together_are_the_terms_apart() -> None:
    case = accuracy_case(1000, torch.float32)
    weights = torch.randn(2, len(case.labels), generator=torch.Generator().manual_seed(0))
    keywords = {"vocab_size": case.vocab_size}

    def both(z: Tensor) -> Tensor:
        terms = losses.unlearning_terms(z, case.labels, reference_logits=case.reference, **keywords)
        return weights[0] * losses.bounded_forgetting(terms.margin) + weights[1] * terms.kl

    def margin_part(z: Tensor) -> Tensor:
        return weights[0] * losses.bounded_forgetting(
            losses.target_margin(z, case.labels, **keywords)
        )

    def kl_part(z: Tensor) -> Tensor:
        return weights[1] * losses.reference_kl(z, case.reference, **keywords)

    parts = gradient(margin_part, case.logits), gradient(kl_part, case.logits)
    error = (gradient(both, case.logits) - parts[0] - parts[1]).abs().sum(-1)
    assert (error <= 1e-5 * (parts[0].abs() + parts[1].abs()).sum(-1)).all()


def clamped_forgetting(logits: Tensor, labels: Tensor) -> Tensor:
    """`-ln(max(1 - p, 1e-5))`, the usual code."""
    p = logits.softmax(-1).gather(-1, labels[:, None]).squeeze(-1)
    return -torch.log(torch.clamp(1 - p, min=1e-5))


def subtracted_forgetting(logits: Tensor, labels: Tensor) -> Tensor:
    """`ln Z - ln(Z - e_y)`, without the clamp."""
    exp = (logits - logits.amax(-1, keepdim=True).detach()).exp()
    total = exp.sum(-1)
    return total.log() - (total - exp.gather(-1, labels[:, None]).squeeze(-1)).log()


@pytest.mark.parametrize("wrong", [clamped_forgetting, subtracted_forgetting])
def test_usual_codes_fail_the_same_bound(wrong: Callable[[Tensor, Tensor], Tensor]) -> None:
    """Where the product holds: at margins of 15 (within +-20) and beyond."""
    case = accuracy_case(1000, torch.float32, margins=(15.0, 19.9, 40.0))
    truth = naive.target_margin(case.logits, case.labels)
    value, bound = naive.softplus(truth), naive.tolerance(truth)
    slope = gradient(
        lambda z: naive.softplus(naive.target_margin(z, case.labels)), case.logits.double()
    )

    def product(z: Tensor, labels: Tensor) -> Tensor:
        return losses.bounded_forgetting(losses.target_margin(z, labels))

    def judge(fn: Callable[[Tensor, Tensor], Tensor]) -> list[str]:
        failed = []
        for row in range(3):
            z, y = case.logits[[row]], case.labels[[row]]
            try:
                naive.assert_values(fn(z, y), value[[row]], bound[[row]])
            except AssertionError:
                failed.append(f"value {row}")
            try:
                naive.assert_gradient(
                    gradient(partial(fn, labels=y), z), slope[[row]], bound[[row]]
                )
            except AssertionError:
                failed.append(f"gradient {row}")
        return failed

    assert judge(product) == []
    assert judge(wrong) == [f"{what} {row}" for row in range(3) for what in ("value", "gradient")]


def test_clamp_gives_memorised_tokens_no_gradient() -> None:
    case = accuracy_case(1000, torch.float32, margins=(15.0, 19.9, 40.0))
    clamped = gradient(lambda z: clamped_forgetting(z, case.labels), case.logits)
    bounded = gradient(
        lambda z: losses.bounded_forgetting(losses.target_margin(z, case.labels)), case.logits
    )
    assert (clamped == 0).all()
    torch.testing.assert_close(bounded.abs().sum(-1), torch.full((3,), 2.0))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_bad_logits_spoil_their_rows_alone(dtype: torch.dtype, device: str) -> None:
    case = poisoned(accuracy_case(11, dtype))
    logits = case.logits.to(device).requires_grad_()
    margin, kl = losses.unlearning_terms(
        logits,
        case.labels.to(device),
        reference_logits=case.reference.to(device),
        vocab_size=case.vocab_size,
    )
    of_student, of_either = spoilt(len(logits), "student"), spoilt(len(logits))
    for loss, bad in (
        (losses.cross_entropy(margin), of_student),
        (losses.bounded_forgetting(margin), of_student),
        (kl, of_either),
    ):
        assert torch.equal(loss.isnan().cpu(), bad)
        (gradient,) = torch.autograd.grad(loss.sum(), logits, retain_graph=True)
        assert torch.equal(gradient.isnan().any(1).cpu(), bad)
