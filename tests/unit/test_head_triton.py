"""The Triton kernels against the torch functions that they stand in for, and against fp64.

On a CPU they run under Triton's interpreter, in a process of its own, because Triton decides at
import. The interpreter cuts fp32 to bf16 where a GPU rounds, so gradients are written in fp32.
"""

import importlib
import os
import subprocess
import sys

import pytest
import torch

from tests.helpers.loss_cases import (
    MARGINS,
    accuracy_case,
    hostile_cases,
    poisoned,
    spoilt,
)
from tests.helpers.naive import (
    TRUTH_NOISE,
    assert_gradient,
    assert_values,
    reference_kl,
    target_margin,
    tolerance,
)
from tests.unit.test_head import assert_same, expected, inputs
from tests.unit.test_head_loss import found

pytest.importorskip("triton")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
pytestmark = [pytest.mark.gpu] if DEVICE == "cuda" else []
runs = pytest.mark.skipif(
    DEVICE == "cpu" and not INTERPRETED, reason="needs a GPU or the interpreter"
)
if INTERPRETED:
    from tests.helpers import interpreter

    interpreter.speed_up()
# The interpreter computes both sides of a choice with numpy, which warns of the one not taken.
quiet = pytest.mark.filterwarnings("ignore::RuntimeWarning")


KERNELS = os.environ.get("HEAD_KERNELS", "megatron_ext.losses.head_triton")


def load_kernels():
    """The module under test; interpreted, a row of the widest case is many blocks."""
    kernels = importlib.import_module(KERNELS)
    if INTERPRETED and hasattr(kernels, "MARGIN_BLOCK"):
        kernels.MARGIN_BLOCK = kernels.DIVERGENCE_BLOCK = 512
    return kernels


@pytest.mark.parametrize("module", ["megatron_ext.losses.head_triton", "benchmarks.candidate"])
@pytest.mark.skipif(DEVICE == "cuda" or INTERPRETED, reason="runs the others, interpreted")
def test_kernels_under_the_interpreter(module):
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    environment["HEAD_KERNELS"] = module
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout
    assert "failed" not in done.stdout


def shards(columns, tp):
    """Start and width of each of `tp` shards."""
    width = columns // tp
    return [(rank * width, width) for rank in range(tp)]


def evaluate(case, tp=1):
    """Margin, KL and both gradients of a case (fp32), through the kernels, shard by shard."""
    kernels = load_kernels()
    z, t, labels = (x.to(DEVICE) for x in (case.logits, case.reference, case.labels))
    before = z.clone()
    parts = []
    for start, width in shards(z.shape[1], tp):
        columns = {
            "vocab_start": start,
            "valid_columns": min(max(case.vocab_size - start, 0), width),
        }
        parts.append((z[:, start : start + width], t[:, start : start + width], columns))
    stats = [
        kernels.shard_statistics(zs, labels, reference_logits=ts, **columns)
        for zs, ts, columns in parts
    ]
    alone = [kernels.shard_statistics(zs, labels, **columns) for zs, _, columns in parts]
    for with_reference, without in zip(stats, alone, strict=True):
        torch.testing.assert_close(
            with_reference[:2], without, rtol=2e-6, atol=2e-6, equal_nan=True
        )
    rows = kernels.combine_statistics(torch.stack(stats))
    ones = torch.ones(len(labels), device=DEVICE)
    gradients = []
    for a, b in ((1.0, None), (None, 1.0), (0.75, -2.0)):
        found = []
        for zs, ts, columns in parts:
            out = torch.full(zs.shape, torch.nan, device=DEVICE)
            kernels.logits_gradient(
                zs,
                labels,
                rows,
                None if a is None else a * ones,
                None if b is None else b * ones,
                reference_logits=ts,
                out=out,
                **columns,
            )
            found.append(out)
        gradients.append(torch.cat(found, 1).cpu())
    torch.testing.assert_close(z, before, rtol=0, atol=0, equal_nan=True)
    return rows, gradients


def check(case, tp=1):
    valid = case.vocab_size
    z = case.logits.double().requires_grad_()
    margin = target_margin(z, case.labels, vocab_size=valid)
    kl = reference_kl(z, case.reference, vocab_size=valid)
    (d_margin,) = torch.autograd.grad(margin.sum(), z)
    (d_kl,) = torch.autograd.grad(kl.sum(), z)
    margin, kl = margin.detach(), kl.detach()
    rows, (got_margin, got_kl, got_both) = evaluate(case, tp)
    bound = tolerance(margin)
    assert_values(rows.margin.cpu(), margin, bound, floor=0.1)
    assert_values(rows.kl.cpu(), kl, bound, floor=1e-3)
    assert (rows.kl >= 0).all()
    assert_gradient(got_margin, d_margin, bound)
    assert_gradient(got_kl, d_kl, bound, noise=TRUTH_NOISE)
    assert_gradient(got_both, 0.75 * d_margin - 2.0 * d_kl, bound)
    assert (got_both[:, valid:] == 0).all()


FEW = (-60.0, -19.9, 0.0, 8.0, 19.9, 120.0)
SIZES = [(11, MARGINS, 1), (11, MARGINS, 4), (1000, FEW, 2), (4999, FEW, 1)]
ACCURACY = [(*size, dtype) for size in SIZES for dtype in (torch.float32, torch.bfloat16)]
# Whose smallest number is not that of the other two: the columns beyond the vocabulary would show it.
ACCURACY += [(11, FEW, 1, torch.float16), (11, FEW, 4, torch.float16)]
# Differences of its logits leave fp32; the torch backend takes them.
BEYOND_FP32 = "spread 6e38"


@runs
@quiet
@pytest.mark.parametrize(("vocab_size", "margins", "tp", "dtype"), ACCURACY)
def test_accuracy(vocab_size, margins, tp, dtype):
    check(accuracy_case(vocab_size, dtype, margins=margins), tp)


@runs
@quiet
@pytest.mark.parametrize("case", hostile_cases(), ids=lambda case: case.name)
def test_hostile(case):
    if case.name != BEYOND_FP32:
        check(case, tp=4)
        return
    rows, gradients = evaluate(case, tp=4)
    for tensor in (rows.margin, rows.kl, *gradients):
        assert tensor.isfinite().all()


@runs
@quiet
@pytest.mark.parametrize(("vocab_size", "tp"), [(1000, 1), (11, 4)])
def test_bad_logits_spoil_their_rows_alone(vocab_size, tp):
    case = accuracy_case(vocab_size, torch.float32, margins=MARGINS[8:18])
    count = len(case.labels)
    _, clean_gradients = evaluate(case, tp)
    rows, (margin, *with_kl) = evaluate(poisoned(case), tp)
    assert torch.equal(rows.margin.isnan().cpu(), spoilt(count, "student"))
    assert torch.equal(rows.kl.isnan().cpu(), spoilt(count))
    # A bad label reaches the margin's gradient by the loss alone, whose derivative is NaN.
    assert torch.equal(margin.isnan().any(1), spoilt(count, "student", "other"))
    for gradient in with_kl:
        assert torch.equal(gradient.isnan().any(1), spoilt(count))
    good = ~spoilt(count)
    for gradient, clean in zip((margin, *with_kl), clean_gradients, strict=True):
        assert torch.equal(gradient[good], clean[good])


@runs
@quiet
def test_gradient_may_overwrite_the_logits():
    kernels = load_kernels()
    case = accuracy_case(1000, torch.bfloat16)
    z, t, labels = (x.to(DEVICE) for x in (case.logits, case.reference, case.labels))
    columns = {"vocab_start": 0, "valid_columns": 1000}
    stats = kernels.shard_statistics(z, labels, reference_logits=t, **columns)
    rows, ones = kernels.combine_statistics(stats[None]), torch.ones(len(labels), device=DEVICE)
    apart = kernels.logits_gradient(z, labels, rows, ones, ones, reference_logits=t, **columns)
    kernels.logits_gradient(z, labels, rows, ones, ones, reference_logits=t, out=z, **columns)
    assert torch.equal(apart, z)


@runs
@quiet
@pytest.mark.parametrize("chunk_size", [7, 12])
@pytest.mark.parametrize("roles", ["mixed", "forget", "replay"])
def test_the_head_of_training_in_chunks(roles, chunk_size):
    kernels = load_kernels()
    arguments = inputs(torch.float32, roles=roles)
    moved = {
        name: value.detach().to(DEVICE) if name not in ("roles", "vocab_size") else value
        for name, value in arguments.items()
    }
    for leaf in ("hidden", "weight"):
        moved[leaf].requires_grad_()
    backend = "triton" if KERNELS == "megatron_ext.losses.head_triton" else kernels
    got = found(moved, chunk_size=chunk_size, backend=backend)
    assert_same([tensor.cpu() for tensor in got], expected(arguments), 1e-5)
