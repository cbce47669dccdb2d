"""The head that is given the loss, against the one that waits for autograd, and against the textbook."""

import pytest
import torch

from megatron_ext.head_chunks import training_chunk
from megatron_ext.losses import head_loss
from megatron_ext.losses.head import unlearning_head
from megatron_ext.losses.head_loss import unlearning_head_loss
from megatron_ext.losses.objectives import bounded_forgetting, cross_entropy
from tests.unit.test_head import (
    ROLES,
    H,
    LargestTensor,
    T,
    V,
    assert_same,
    expected,
    inputs,
    upstream,
)
from tests.unit.test_head_blocks import record_products

CHUNKS = [1, 7, 12, T, 1000]


def linear(margin, kl, places):
    """The loss of `test_head`: its gradients are those of `upstream`."""
    a, b = (weights.to(margin.device)[places][: len(margin)] for weights in upstream())
    return (a * margin + b * kl).sum()


def objective(roles):
    """A loss as that of training: bounded, and not linear in the margins."""

    def loss(margin, kl, places):
        role = roles[places]
        forget = bounded_forgetting(margin) * (role == -1) / 7
        replay = (cross_entropy(margin) + kl) * (role == 1) / 15
        return (forget + replay).sum()

    return loss


def found(arguments, token_loss=linear, *, scale=1.0, **options):
    out = unlearning_head_loss(**arguments, token_loss=token_loss, **options)
    leaves = (arguments["hidden"], arguments["weight"])
    gradients = torch.autograd.grad(out.loss * scale, leaves)
    return out.margin, out.kl, *gradients


@pytest.mark.parametrize("chunk_size", CHUNKS)
@pytest.mark.parametrize("roles", ROLES)
def test_equals_the_textbook(roles, chunk_size):
    arguments = inputs(roles=roles)
    got = found(arguments, chunk_size=chunk_size)
    assert [x.dtype for x in got[:2]] == [torch.float32] * 2
    assert not got[0].requires_grad
    assert_same(got, expected(arguments), 1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("chunk_size", CHUNKS)
def test_low_precision(dtype, chunk_size):
    bound = 1e-5 if dtype == torch.float32 else 2e-2
    assert_same(found(inputs(dtype), chunk_size=chunk_size), expected(inputs(dtype)), bound)


@pytest.mark.parametrize("chunk_size", CHUNKS)
def test_gradients_are_summed_over_chunks_in_fp32(chunk_size):
    got = found(inputs(torch.bfloat16), chunk_size=chunk_size, fp32_logits=True)
    assert_same(got, expected(inputs(torch.bfloat16)), 2.5e-3)  # see `test_head`


@pytest.mark.parametrize("reference", [True, False], ids=["reference", "none"])
@pytest.mark.parametrize("chunk_size", [1, 7, T])
def test_a_loss_that_bends(chunk_size, reference):
    arguments = inputs()
    if not reference:
        arguments |= {"reference_hidden": None, "reference_weight": None}
    loss = objective(arguments["roles"])
    leaves = (arguments["hidden"], arguments["weight"])
    terms = unlearning_head(**arguments)
    want = loss(*terms, slice(None))
    out = unlearning_head_loss(**arguments, token_loss=loss, chunk_size=chunk_size)
    assert out.loss.item() == want.item()  # of all tokens at once, whatever the chunks
    got = torch.autograd.grad(3.5 * out.loss, leaves)
    assert_same(got, torch.autograd.grad(3.5 * want, leaves), 1e-6)


def test_fp16_gradients_are_made_with_the_scale_of_the_loss():
    """Without it they fade in fp16: those of a mean over 1e8 tokens are below its smallest number."""
    arguments = inputs(torch.float16)
    tiny = found(arguments, lambda *terms: linear(*terms) * 1e-9, scale=1e9, chunk_size=7)
    assert_same(tiny, expected(arguments), 2e-2)


def test_every_product_is_made_once(monkeypatch):
    arguments = inputs(roles="replay")
    calls = record_products(monkeypatch)
    found(arguments, chunk_size=12)
    of = [(rows, weight is arguments["weight"]) for rows, weight in calls]
    assert of == [(rows, student) for rows in (12, 12, 5) for student in (True, False)]


@pytest.mark.parametrize("roles", ROLES)
def test_no_tensor_is_larger_than_a_chunk_of_logits(roles):
    arguments = inputs(roles=roles)
    with LargestTensor() as seen:
        found(arguments, chunk_size=4)
    assert seen.largest <= max(4 * V, V * H, T * H) < T * V


@pytest.mark.parametrize("chunk_size", [7, T])
def test_main_grad_receives_the_sum_in_fp32(chunk_size):
    arguments = inputs(torch.bfloat16)
    weight = arguments["weight"]
    weight.main_grad = torch.ones(V, H)
    weight.grad_added_to_main_grad = False
    for _ in range(2):
        options = {"chunk_size": chunk_size, "fuse_weight_gradient": True}
        out = unlearning_head_loss(**arguments, token_loss=linear, **options)
        (out.loss / 4).backward()
    want = 1 + expected(inputs(torch.bfloat16))[3] / 2
    assert_same([weight.main_grad], [want], 2e-2)
    assert weight.grad_added_to_main_grad
    assert weight.main_grad.dtype == torch.float32


def test_nothing_reaches_main_grad_before_the_backward_pass():
    arguments = inputs()
    arguments["weight"].main_grad = torch.zeros(V, H, dtype=torch.float64)
    unlearning_head_loss(**arguments, token_loss=linear, chunk_size=7, fuse_weight_gradient=True)
    assert (arguments["weight"].main_grad == 0).all()


def test_only_one_leaf_needs_a_gradient():
    want = expected(inputs())
    for index, leaf, frozen in ((2, "hidden", "weight"), (3, "weight", "hidden")):
        arguments = inputs()
        arguments[frozen].requires_grad_(False)
        unlearning_head_loss(**arguments, token_loss=linear, chunk_size=7).loss.backward()
        assert_same([arguments[leaf].grad], [want[index]], 1e-6)
        assert arguments[frozen].grad is None


def test_a_second_backward_pass_is_refused():
    out = unlearning_head_loss(**inputs(), token_loss=linear, chunk_size=7)
    out.loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="second backward pass"):
        out.loss.backward()


def test_validation_makes_no_gradients(monkeypatch):
    monkeypatch.setattr(head_loss, "UnlearningHeadLossFunction", None)
    with torch.no_grad():
        out = unlearning_head_loss(**inputs(), token_loss=linear, chunk_size=7)
    assert not out.loss.requires_grad
    assert_same([out.margin, out.kl], expected(inputs())[:2], 1e-6)


def test_a_loss_of_the_kl_alone():
    arguments = inputs()
    out = unlearning_head_loss(
        **arguments, token_loss=lambda margin, kl, places: kl.sum(), chunk_size=7
    )
    leaves = (arguments["hidden"], arguments["weight"])
    want = torch.autograd.grad(unlearning_head(**arguments).kl.sum(), leaves)
    assert_same(torch.autograd.grad(out.loss, leaves), want, 1e-6)


@pytest.mark.parametrize("chunk_size", [None, 7])
def test_no_tokens(chunk_size):
    arguments = inputs()
    empty = {x: arguments[x][:0] for x in ("labels", "roles", "reference_hidden")}
    hidden = arguments["hidden"].detach()[:0].requires_grad_()
    out = unlearning_head_loss(
        **(arguments | empty | {"hidden": hidden}),
        token_loss=lambda margin, kl, places: (margin + kl).sum(),
        chunk_size=chunk_size,
    )
    out.loss.backward()
    assert out.loss == 0
    assert out.margin.shape == out.kl.shape == (0,)
    assert (arguments["weight"].grad == 0).all()


def test_chunks_follow_the_device():
    def chunk(tokens, references=0, columns=32768, hidden=512):
        sizes = {"element_size": 4, "gradient_size": 4, "gpu_memory": None}
        return training_chunk(tokens, columns, hidden, references, **sizes)

    assert chunk(256) == 256  # all in 32 MiB
    assert chunk(257) == 128
    assert chunk(128, 129) == 128
    assert chunk(100, 200) == 100  # all tokens, whose logits do not fit, in one chunk
    assert chunk(1024, 1024) == 128
    assert chunk(1024, 1024, columns=4096) == 1024
    assert chunk(2048, 2048, columns=4096) == 512  # 16 MiB of both
    assert chunk(1000, hidden=1600) == 384  # at most 400: three of 334 each, in tiles of 64
    assert chunk(2048, hidden=8) == 128  # 16 MiB
    assert chunk(2048, columns=131072, hidden=8) == 64  # never less than a tile


def test_chunks_on_a_gpu_follow_the_size_of_its_memory():
    def chunk(tokens, references=0):
        sizes = {"element_size": 2, "gradient_size": 4, "gpu_memory": 16 * 2**30}
        return training_chunk(tokens, 131072, 2048, references, **sizes)

    assert chunk(4096) == 4096  # 1 GiB
    assert chunk(4097) == 2112  # two of about one size
    assert chunk(8192, 8192) == 2048
    assert chunk(2048, 2048) == 2048


def test_a_chunk_without_a_token_is_refused():
    with pytest.raises(ValueError, match="chunk_size must be positive, got 0"):
        unlearning_head_loss(**inputs(), token_loss=linear, chunk_size=0)
