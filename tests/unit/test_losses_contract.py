"""What the losses accept, refuse and leave alone."""

import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_ext import losses
from megatron_ext.losses import blocks, vocab_parallel
from tests.helpers import naive

N, V = 6, 13


@pytest.fixture
def logits() -> Tensor:
    return 3 * torch.randn(N, V, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def labels() -> Tensor:
    return torch.tensor([0, 12, 5, 5, 1, 7])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("label_dtype", [torch.int64, torch.int32])
def test_dtypes_and_leading_shape(logits, labels, dtype, label_dtype) -> None:
    z = logits.to(dtype).view(2, 3, V).requires_grad_()
    y = labels.to(label_dtype).view(2, 3)
    t = (logits.flip(0)).view(2, 3, V)  # of another type than the logits
    margin, kl = losses.unlearning_terms(z, y, reference_logits=t)
    assert margin.shape == kl.shape == (2, 3)
    assert margin.dtype == kl.dtype == torch.float32
    naive.assert_values(margin, naive.target_margin(z.detach(), y), 1e-5, floor=1.0)
    naive.assert_values(kl, naive.reference_kl(z.detach(), t), 1e-5)
    (margin + kl).sum().backward()
    assert z.grad.dtype == dtype


def test_logits_that_are_not_contiguous(logits, labels) -> None:
    spread = torch.zeros(V, 2 * N)
    spread[:, ::2] = logits.T
    view = spread[:, ::2].T
    assert not view.is_contiguous()
    assert torch.equal(losses.target_margin(view, labels), losses.target_margin(logits, labels))


def test_inputs_are_not_changed(logits, labels) -> None:
    inputs = (logits.requires_grad_(), labels, logits.detach().flip(0))
    copies = [x.detach().clone() for x in inputs]
    versions = [x._version for x in inputs]
    margin, kl = losses.unlearning_terms(logits, labels, reference_logits=inputs[2])
    (margin.square() + kl).sum().backward()
    assert [x._version for x in inputs] == versions
    assert all(torch.equal(x, copy) for x, copy in zip(inputs, copies, strict=True))


def test_reference_gets_no_gradient(logits, labels) -> None:
    reference = logits.flip(0).requires_grad_()
    logits.requires_grad_()
    terms = losses.unlearning_terms(logits, labels, reference_logits=reference)
    sum(terms).sum().backward()
    losses.reference_kl(logits, reference).sum().backward()
    assert logits.grad is not None
    assert reference.grad is None
    assert not losses.reference_kl(logits.detach(), reference).requires_grad


def test_no_reference_gives_kl_of_zero_without_gradient(logits, labels) -> None:
    terms = losses.unlearning_terms(logits.requires_grad_(), labels)
    assert torch.equal(terms.kl, torch.zeros(N))
    assert not terms.kl.requires_grad
    assert terms.margin.requires_grad


def test_no_tokens(logits, labels) -> None:
    z = logits[:0].requires_grad_()
    margin, kl = losses.unlearning_terms(z, labels[:0], reference_logits=logits[:0])
    assert margin.shape == kl.shape == (0,)
    (margin.sum() + kl.sum()).backward()
    assert z.grad.shape == (0, V)


@pytest.mark.parametrize("bad", [-1, -100, V, 2**40])
def test_label_out_of_range(logits, labels, bad: int) -> None:
    labels = labels.view(2, 3)
    labels[1, 2] = bad
    with pytest.raises(ValueError, match=rf"0\.\.{V - 1}, got {bad} at position \(1, 2\)"):
        losses.target_margin(logits.view(2, 3, V), labels)


def test_label_in_the_padding_is_out_of_range(logits, labels) -> None:
    losses.target_margin(logits, labels, vocab_size=13)
    with pytest.raises(ValueError, match=r"0\.\.11, got 12 at position \(1,\)"):
        losses.target_margin(logits, labels, vocab_size=12)


BAD_LABEL_ON_DEVICE = """
import torch
from megatron_ext import losses
losses.target_margin(torch.zeros(2, 8, device="cuda"), torch.tensor([0, 8], device="cuda"))
torch.cuda.synchronize()
"""


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_label_out_of_range_fails_an_assertion_on_the_device() -> None:
    # In a process of its own: a failed assertion leaves the device's context unusable.
    done = subprocess.run(
        [sys.executable, "-c", BAD_LABEL_ON_DEVICE], capture_output=True, text=True, check=False
    )
    assert done.returncode != 0
    assert "device-side assert" in done.stderr


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda z, y: losses.target_margin(z, y.float()), TypeError, "labels must be integers"),
        (lambda z, y: losses.target_margin(z, y > 0), TypeError, "labels must be integers"),
        (lambda z, y: losses.target_margin(z.long(), y), TypeError, "logits must be floating"),
        (lambda z, y: losses.reference_kl(z, z.int()), TypeError, "reference_logits must be fl"),
        (lambda z, y: losses.target_margin(z, y[:-1]), ValueError, r"shape \(6,\).*got \(5,\)"),
        (lambda z, y: losses.reference_kl(z, z[:1]), ValueError, r"shape \(6, 13\), got \(1, 13"),
        (lambda z, y: losses.target_margin(z, y, vocab_size=14), ValueError, r"1\.\.13.*got 14"),
        (lambda z, y: losses.reference_kl(z, z, vocab_size=0), ValueError, r"1\.\.13.*got 0"),
        (
            lambda z, y: losses.target_margin(z[:, :1], y * 0),
            ValueError,
            "at least 2 columns, got 1",
        ),
        (lambda z, y: losses.target_margin(z, y * 0, vocab_size=1), ValueError, "at least 2 colu"),
        (lambda z, y: losses.target_margin(z[:, :0], y), ValueError, "at least one column"),
    ],
)
def test_bad_arguments(
    logits, labels, call: Callable, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        call(logits, labels)


def test_kl_of_one_column_is_zero(logits) -> None:
    assert torch.equal(losses.reference_kl(logits, 2 * logits, vocab_size=1), torch.zeros(N))


def test_second_derivative_is_refused(logits, labels) -> None:
    margin = losses.target_margin(logits.requires_grad_(), labels)
    (slope,) = torch.autograd.grad(margin.square().sum(), logits, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        slope.sum().backward()


def test_forget_losses_by_flag() -> None:
    margin = torch.tensor([-2.0, 3.0])
    assert torch.equal(losses.FORGET_LOSSES["bounded"](margin), losses.bounded_forgetting(margin))
    assert torch.equal(
        losses.FORGET_LOSSES["gradient-ascent"](margin), -losses.cross_entropy(margin)
    )
    assert set(losses.FORGET_LOSSES) == {"bounded", "gradient-ascent"}


@pytest.mark.parametrize("elements", [1, 2 * V, 4 * V])
def test_blocks_of_rows_do_not_show(logits, labels, monkeypatch, elements: int) -> None:
    def run() -> list[Tensor]:
        z = logits.clone().requires_grad_()
        margin, kl = losses.unlearning_terms(z, labels, reference_logits=logits.flip(0))
        (margin + kl).sum().backward()
        return [margin, kl, z.grad]

    whole = run()
    monkeypatch.setitem(blocks.BLOCK_ELEMENTS, "cpu", elements)
    for actual, expected in zip(run(), whole, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)


class LargestTensor(TorchDispatchMode):
    """The most bytes that one operation returned in memory of its own, logits' type excepted."""

    def __init__(self, excepted: torch.dtype) -> None:
        super().__init__()
        self.excepted, self.nbytes = excepted, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.dtype != self.excepted:
            self.nbytes = max(self.nbytes, result.untyped_storage().nbytes())
        return result


def test_logits_are_never_whole_in_a_wider_type() -> None:
    z = torch.randn(64, 2**15).bfloat16().requires_grad_()
    y = torch.arange(64)
    t = z.detach().flip(0)
    with LargestTensor(torch.bfloat16) as seen:
        margin, kl = losses.unlearning_terms(z, y, reference_logits=t)
        (margin + kl).sum().backward()
    assert seen.nbytes == 8 * blocks.BLOCK_ELEMENTS["cpu"]
    assert seen.nbytes < 8 * z.numel()


def test_gradient_may_overwrite_the_logits(logits, labels) -> None:
    columns = {"vocab_start": 0, "valid_columns": V - 1}
    labels = labels.clamp(max=V - 2)
    reference = logits.flip(0)
    stats = vocab_parallel.shard_statistics(logits, labels, reference_logits=reference, **columns)
    rows = vocab_parallel.combine_statistics(vocab_parallel.gather_statistics(stats, None))
    weights = torch.randn(2, N)
    arguments = (labels, rows, weights[0], weights[1])
    expected = vocab_parallel.logits_gradient(
        logits, *arguments, reference_logits=reference, **columns
    )
    scratch = logits.clone()
    actual = vocab_parallel.logits_gradient(
        scratch, *arguments, reference_logits=reference, out=scratch, **columns
    )
    assert actual is scratch
    assert torch.equal(actual, expected)


GROUP_AGNOSTIC = """
import sys
class NoMegatron:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("megatron", "transformer_engine"):
            raise AssertionError(f"the losses import {name}")
sys.meta_path.insert(0, NoMegatron())
import torch
from megatron_ext import losses
z = torch.randn(4, 8, requires_grad=True)
margin, kl = losses.unlearning_terms(z, torch.arange(4), reference_logits=z.detach().flip(0))
(losses.bounded_forgetting(margin) + kl).sum().backward()
assert not torch.distributed.is_initialized()
loaded = [name for name in sys.modules if name.split(".")[0] == "megatron"]
assert not loaded, loaded
print("agnostic")
"""


def test_neither_megatron_nor_global_state_is_touched() -> None:
    done = subprocess.run(
        [sys.executable, "-c", GROUP_AGNOSTIC], capture_output=True, text=True, check=False
    )
    assert done.stdout == "agnostic\n", done.stderr
