"""The fused head against the textbook on the logits that it never holds as a whole."""

from types import ModuleType

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_ext.losses import head_memory, vocab_parallel
from megatron_ext.losses.head import unlearning_head
from tests.helpers import naive

T, H, V, VALID = 29, 24, 88, 83
# How much of the logits exists at a time; a budget of 1 byte makes blocks of one token and nine columns.
BLOCKS = [{}, {"chunk_size": 1}, {"chunk_size": 7}, {"chunk_size": T}, {"chunk_size": 1000}]
BLOCKS += [{"memory_budget_bytes": size} for size in (1, 9 * 7 * 16, 5000)]


@pytest.fixture(autouse=True)
def narrow_tile(monkeypatch):
    """Blocks of columns at these sizes."""
    monkeypatch.setattr(head_memory, "COLUMNS_TILE", 9)


ROLES = {
    "mixed": [(-1, 0, 1, 1)[i % 4] for i in range(T)],
    "forget": [-1] * T,
    "replay": [1] * T,
    "ignored": [0] * T,
}


def inputs(dtype=torch.float64, roles="mixed"):
    """Keyword arguments of the head; hidden and weight are leaves."""
    rng = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=rng, dtype=torch.float64)

    hidden, weight = normal(T, H), normal(V, H) / 4
    return {
        "hidden": hidden.to(dtype).requires_grad_(),
        "weight": weight.to(dtype).requires_grad_(),
        "labels": torch.randint(VALID, (T,), generator=rng),
        "roles": torch.tensor(ROLES[roles]),
        "reference_hidden": (hidden + 0.3 * normal(T, H)).to(dtype),
        "reference_weight": (weight + 0.02 * normal(V, H)).to(dtype),
        "vocab_size": VALID,
    }


def upstream():
    """Gradients of margin and KL."""
    rng = torch.Generator().manual_seed(1)
    return torch.randn(T, generator=rng), torch.randn(T, generator=rng)


def expected(arguments):
    """Margin, KL and gradients in fp64, through whole logits and autograd."""
    hidden, weight = (arguments[x].detach().double().requires_grad_() for x in ("hidden", "weight"))
    logits = hidden @ weight.t()
    margin = naive.target_margin(logits, arguments["labels"], vocab_size=VALID)
    kl = torch.zeros_like(margin)
    if arguments["reference_hidden"] is not None:
        reference = (
            arguments["reference_hidden"].double() @ arguments["reference_weight"].double().t()
        )
        kl = naive.reference_kl(logits, reference, vocab_size=VALID) * (arguments["roles"] == 1)
    a, b = upstream()
    gradients = torch.autograd.grad((a * margin + b * kl).sum(), (hidden, weight))
    return margin.detach(), kl.detach(), *gradients


def actual(arguments, **options):
    out = unlearning_head(**arguments, **options)
    a, b = upstream()
    gradients = torch.autograd.grad(
        (a * out.margin + b * out.kl).sum(), (arguments["hidden"], arguments["weight"])
    )
    return out.margin.detach(), out.kl.detach(), *gradients


def assert_same(found, wanted, bound=1e-5):
    for got, want in zip(found, wanted, strict=True):
        assert (got.double() - want).norm() <= bound * want.norm() + 1e-12


@pytest.mark.parametrize("blocks", BLOCKS, ids=str)
@pytest.mark.parametrize("roles", ROLES)
def test_equals_the_textbook(roles, blocks):
    arguments = inputs(roles=roles)
    found = actual(arguments, **blocks)
    assert [x.dtype for x in found[:2]] == [torch.float32] * 2
    assert_same(found, expected(arguments), 1e-6)
    assert (found[1][arguments["roles"] != 1] == 0).all()


@pytest.mark.parametrize("blocks", BLOCKS, ids=str)
def test_without_a_reference(blocks):
    arguments = inputs() | {"reference_hidden": None, "reference_weight": None}
    out = unlearning_head(**arguments, **blocks)
    assert (out.kl == 0).all()
    assert not out.kl.requires_grad
    (got,) = torch.autograd.grad(out.margin.sum(), arguments["hidden"])
    z = arguments["hidden"] @ arguments["weight"].t()
    margin = naive.target_margin(z, arguments["labels"], vocab_size=VALID)
    (want,) = torch.autograd.grad(margin.sum(), arguments["hidden"])
    assert_same([got], [want], 1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("blocks", BLOCKS, ids=str)
def test_low_precision(dtype, blocks):
    arguments = inputs(dtype)
    bound = 1e-5 if dtype == torch.float32 else 2e-2  # bf16: logits and gradients are rounded
    assert_same(actual(arguments, **blocks), expected(arguments), bound)


@pytest.mark.parametrize("blocks", BLOCKS, ids=str)
def test_gradients_are_summed_over_blocks_in_fp32(blocks):
    """Summed in bf16 they are off by 3e-3 (hidden) and 5e-3 (weight), however exact the logits are."""
    arguments = inputs(torch.bfloat16)
    found = actual(arguments, **blocks, fp32_logits=True)
    # Those of the logits and the sums are rounded to bf16, once each: 2e-3 was seen, for all blocks.
    assert_same(found, expected(arguments), 2.5e-3)


def test_fp32_logits_keep_a_small_kl():
    """bf16 logits drown a KL of 1e-5; those left in fp32 do not."""
    arguments = inputs(torch.bfloat16, roles="replay")
    nudge = torch.randn(V, H, generator=torch.Generator().manual_seed(2)) * 2e-3
    arguments["reference_hidden"] = arguments["hidden"].detach()
    arguments["reference_weight"] = (arguments["weight"].detach().float() + nudge).bfloat16()
    want = expected(arguments)[1]
    assert want.max() < 1e-3
    rounded = unlearning_head(**arguments).kl
    exact = unlearning_head(**arguments, fp32_logits=True).kl
    assert_same([exact], [want], 1e-4)
    assert (rounded.double() - want).norm() > 0.1 * want.norm()


def test_backward_twice_through_one_graph():
    """The first backward overwrites the kept logits; the second must not use what is left."""
    arguments = inputs()
    out = unlearning_head(**arguments)
    leaves = (arguments["hidden"], arguments["weight"])
    loss = out.margin.square().sum() + out.kl.sum()
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    second = torch.autograd.grad(loss, leaves)
    assert_same(second, first, 1e-14)


def test_only_one_leaf_needs_a_gradient():
    want = expected(inputs())
    for index, frozen in ((2, "weight"), (3, "hidden")):
        arguments = inputs()
        arguments[frozen].requires_grad_(False)
        out = unlearning_head(**arguments, chunk_size=7)
        a, b = upstream()
        (a * out.margin + b * out.kl).sum().backward()
        leaf = arguments["hidden" if index == 2 else "weight"]
        assert_same([leaf.grad], [want[index]], 1e-6)
        assert arguments[frozen].grad is None


class LargestTensor(TorchDispatchMode):
    """Sizes of all tensors that operations return."""

    def __init__(self):
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        result = function(*arguments, **(options or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self.largest = max(self.largest, tensor.numel())
        return result


@pytest.mark.parametrize("roles", ROLES)
def test_no_tensor_is_larger_than_a_chunk_of_logits(roles):
    arguments = inputs(roles=roles)
    with LargestTensor() as seen:
        actual(arguments, chunk_size=4)
    assert seen.largest <= max(4 * V, V * H, T * H) < T * V
    with LargestTensor() as seen:
        actual(arguments, memory_budget_bytes=2 * T * 9 * 8)
    assert seen.largest <= max(T * 9, V * H, T * H)
    with LargestTensor() as seen:
        actual(arguments, chunk_size=T)
    assert seen.largest >= T * V  # the measurement sees logits where there are any


def test_tokens_without_a_role_of_replay_cost_no_reference():
    arguments = inputs()
    poisoned = arguments["reference_hidden"].clone()
    poisoned[arguments["roles"] != 1] = torch.nan
    assert_same(
        actual(arguments | {"reference_hidden": poisoned}, chunk_size=7), expected(arguments), 1e-6
    )


@pytest.mark.parametrize("blocks", BLOCKS, ids=str)
def test_main_grad_receives_the_sum_in_fp32(blocks):
    arguments = inputs(torch.bfloat16)
    weight = arguments["weight"]
    weight.main_grad = torch.ones(V, H)
    weight.grad_added_to_main_grad = False
    a, b = upstream()
    for _ in range(2):
        out = unlearning_head(**arguments, **blocks, fuse_weight_gradient=True)
        (a * out.margin + b * out.kl).sum().backward()
    want = 1 + 2 * expected(arguments)[3]
    assert_same([weight.main_grad], [want], 2e-2)
    assert weight.grad_added_to_main_grad
    assert weight.main_grad.dtype == torch.float32


def test_main_grad_is_left_alone_unless_asked():
    arguments = inputs()
    arguments["weight"].main_grad = torch.ones(V, H)
    actual(arguments)
    assert (arguments["weight"].main_grad == 1).all()


def test_zero_out_wgrad_returns_zeros():
    arguments = inputs()
    weight = arguments["weight"]
    weight.main_grad = torch.zeros(V, H, dtype=torch.float64)
    weight.grad_added_to_main_grad, weight.zero_out_wgrad = False, True
    unlearning_head(**arguments, fuse_weight_gradient=True).margin.sum().backward()
    assert (weight.grad == 0).all()
    assert weight.main_grad.abs().sum() > 0


def test_no_tokens():
    arguments = inputs()
    empty = {x: arguments[x][:0] for x in ("labels", "roles", "reference_hidden")}
    hidden = arguments["hidden"].detach()[:0].requires_grad_()
    out = unlearning_head(**(arguments | empty | {"hidden": hidden}))
    assert out.margin.shape == out.kl.shape == (0,)
    out.margin.sum().backward()
    assert (arguments["weight"].grad == 0).all()


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"labels": torch.full((T,), VALID)}, ValueError),
        ({"labels": torch.zeros(T - 1, dtype=torch.long)}, ValueError),
        ({"roles": torch.zeros(T - 1)}, ValueError),
        ({"reference_weight": None}, ValueError),
        ({"reference_hidden": torch.zeros(T - 1, H)}, ValueError),
        ({"reference_weight": torch.zeros(V, H)}, TypeError),
        ({"weight": torch.zeros(V, H + 1, dtype=torch.float64)}, ValueError),
        ({"weight": torch.zeros(V, H)}, TypeError),
        ({"vocab_size": V + 1}, ValueError),
        ({"chunk_size": 0}, ValueError),
        ({"backend": "triton"}, ValueError),
        ({"backend": "cuda"}, ValueError),
        ({"backend": vocab_parallel}, ValueError),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_errors(change, error, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(error):
        unlearning_head(**(inputs() | change))


def test_kernels_of_ones_own(monkeypatch):
    """A module is called in the place of Triton's, and refused where that would be."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    names = {"shard_statistics", "combine_statistics", "logits_gradient"}
    called, own = set(), ModuleType("own")
    for name in names:

        def function(*args, name=name, **options):
            called.add(name)
            return getattr(vocab_parallel, name)(*args, **options)

        setattr(own, name, function)
    arguments = inputs(torch.float32)
    out = unlearning_head(**arguments, backend=own)
    (out.margin.sum() + out.kl.sum()).backward()
    assert called == names
    assert torch.equal(out.margin, unlearning_head(**arguments, backend="torch").margin)
    with pytest.raises(TypeError, match="float64"):
        unlearning_head(**inputs(torch.float64), backend=own)
