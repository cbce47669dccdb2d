"""The losses on vocabulary shards: 4 ranks, once, on which TP 4, TP 2 and TP 1 are judged.

The ranks return what they computed; the tests compare with fp64 over the whole vocabulary.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
import torch.distributed.nn.functional as differentiable
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_ext import losses
from tests.helpers import naive
from tests.helpers.distributed import RankError, run_ranks
from tests.helpers.loss_cases import Case, accuracy_cases, hostile_cases

WORLD = 4
SIZES = (4, 2, 1)
LOSSES: dict[str, Callable[[losses.Terms], Tensor]] = {
    "cross_entropy": lambda terms: losses.cross_entropy(terms.margin),
    "bounded_forgetting": lambda terms: losses.bounded_forgetting(terms.margin),
    "gradient_ascent": lambda terms: losses.gradient_ascent(terms.margin),
    "kl": lambda terms: terms.kl,
}


def all_cases() -> dict[str, Case]:
    return {case.name: case for case in [*accuracy_cases(), *hostile_cases()]}


class Shard(NamedTuple):
    """What one rank computed of one case."""

    margin: Tensor
    kl: Tensor
    gradients: dict[str, Tensor]  # of this rank's columns, by loss
    forward_collectives: int
    backward_collectives: int


class CollectiveCounter(TorchDispatchMode):
    """Counts what reaches torch.distributed's backends, by whichever function it was called."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func.namespace in ("c10d", "_c10d_functional")
        return func(*args, **(kwargs or {}))


def tensor_parallel_group(size: int) -> dist.ProcessGroup | None:
    """This rank's group of `size` ranks; all ranks must call it."""
    if size == 1:
        return None
    group, _ = dist.new_subgroups(size)
    return group


def own_columns(tensor: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    size, rank = (dist.get_world_size(group), dist.get_rank(group)) if group else (1, 0)
    return tensor.chunk(size, -1)[rank].contiguous()


def compute(case: Case, group: dist.ProcessGroup | None, dtype: torch.dtype) -> Shard:
    """Terms and gradients of one case; `dtype` is that of the leaf, so of the gradient."""
    z = own_columns(case.logits, group).to(dtype).requires_grad_()
    reference = own_columns(case.reference, group)
    with CollectiveCounter() as forward:
        terms = losses.unlearning_terms(
            z, case.labels, reference_logits=reference, tp_group=group, vocab_size=case.vocab_size
        )
    with CollectiveCounter() as backward:
        gradients = {
            name: torch.autograd.grad(loss(terms).sum(), z, retain_graph=True)[0]
            for name, loss in LOSSES.items()
        }
    return Shard(terms.margin.detach(), terms.kl.detach(), gradients, forward.count, backward.count)


def all_reduced_margin(
    logits: Tensor, labels: Tensor, group: dist.ProcessGroup, all_reduce: Callable[..., Tensor]
) -> Tensor:
    """A vocab-parallel margin as autograd would have it: collectives in the graph."""
    start = dist.get_rank(group) * logits.shape[-1]
    here = torch.nn.functional.one_hot((labels - start).clamp(0, logits.shape[-1] - 1))
    here = torch.nn.functional.pad(here, (0, logits.shape[-1] - here.shape[-1])).bool()
    here &= ((labels >= start) & (labels < start + logits.shape[-1]))[:, None]
    largest = logits.detach().amax(-1)
    dist.all_reduce(largest, dist.ReduceOp.MAX, group=group)
    shifted = logits - largest[:, None]
    z_y = all_reduce(shifted.masked_fill(~here, 0).sum(-1), group=group)
    rest = all_reduce(shifted.masked_fill(here, -torch.inf).exp().sum(-1), group=group)
    return z_y - rest.log()


def autograd_case() -> Case:
    """Margins that the plain formula can do in fp32."""
    rng = torch.Generator().manual_seed(3)
    logits = torch.randn(8, 16, generator=rng)
    return Case("plain", logits, torch.arange(8) * 2, logits, 16)


def on_rank() -> dict[str, Any]:
    """Everything that the tests below ask of one rank."""
    groups = {size: tensor_parallel_group(size) for size in SIZES}
    shards: dict[tuple[str, int], Shard] = {}
    rounded: dict[tuple[str, int], bool] = {}
    for case in all_cases().values():
        for size, group in groups.items():
            # An fp32 leaf with the same numbers shows the gradient before its rounding to bf16.
            shard = shards[case.name, size] = compute(case, group, torch.float32)
            if case.logits.dtype != torch.float32:
                low = compute(case, group, case.logits.dtype)
                rounded[case.name, size] = all(
                    torch.equal(low.gradients[name], exact.to(case.logits.dtype))
                    for name, exact in shard.gradients.items()
                )

    group, plain = groups[4], autograd_case()
    whole = dist.group.WORLD
    errors = []
    for bad in (-1, plain.vocab_size):
        labels = plain.labels.clone()
        labels[3] = bad
        try:
            losses.target_margin(own_columns(plain.logits, group), labels, tp_group=group)
        except ValueError as error:
            errors.append(str(error))

    z = own_columns(plain.logits, group).requires_grad_()
    with CollectiveCounter() as counted:
        margin = all_reduced_margin(z, plain.labels, group, differentiable.all_reduce)
    with CollectiveCounter() as counted_backward:
        (gradient,) = torch.autograd.grad(losses.bounded_forgetting(margin).sum(), z)

    parts: dict[str, Tensor | int] = {}
    with CollectiveCounter() as margin_only:
        parts["margin"] = losses.target_margin(z, plain.labels, tp_group=whole).detach()
    with CollectiveCounter() as kl_only:
        parts["kl"] = losses.reference_kl(z, 2 * z.detach(), tp_group=whole).detach()
    return {
        "shards": shards,
        "rounded": rounded,
        "errors": errors,
        "autograd": (margin.detach(), gradient, counted.count, counted_backward.count),
        "parts": parts,
        "part collectives": (margin_only.count, kl_only.count),
    }


@pytest.fixture(scope="module")
def ranks() -> list[dict[str, Any]]:
    return run_ranks(on_rank, WORLD)


def joined(ranks: list[dict[str, Any]], case: str, size: int, loss: str) -> list[Tensor]:
    """Gradients over the whole vocabulary, one of each group of `size` ranks."""
    shards = [rank["shards"][case, size].gradients[loss] for rank in ranks]
    return [torch.cat(shards[i : i + size], -1) for i in range(0, WORLD, size)]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("case", all_cases().values(), ids=lambda case: case.name)
def test_values(ranks, case: Case, size: int) -> None:
    largest = torch.finfo(torch.float32).max
    margin = naive.target_margin(case.logits, case.labels, vocab_size=case.vocab_size)
    margin = margin.clamp(-largest, largest)
    kl = naive.reference_kl(case.logits, case.reference, vocab_size=case.vocab_size)
    first = ranks[0]["shards"][case.name, size]
    naive.assert_values(first.margin, margin, naive.tolerance(margin), floor=1.0)
    for name, objective in naive.OBJECTIVES.items():
        value = LOSSES[name](losses.Terms(first.margin, first.kl))
        naive.assert_values(value, objective(margin), naive.tolerance(margin))
    naive.assert_values(first.kl, kl.clamp(max=largest), 1e-5, floor=1e-3)
    for rank in ranks:
        assert torch.equal(rank["shards"][case.name, size].margin, first.margin)
        assert torch.equal(rank["shards"][case.name, size].kl, first.kl)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("case", all_cases().values(), ids=lambda case: case.name)
def test_gradients(ranks, case: Case, size: int) -> None:
    z = case.logits.double().requires_grad_()
    margin = naive.target_margin(z, case.labels, vocab_size=case.vocab_size)
    values = {name: objective(margin) for name, objective in naive.OBJECTIVES.items()}
    values["kl"] = naive.reference_kl(z, case.reference, vocab_size=case.vocab_size)
    for name, value in values.items():
        (expected,) = torch.autograd.grad(value.sum(), z, retain_graph=True)
        bound = 1e-5 if name == "kl" else naive.tolerance(margin.detach())
        noise = naive.divergence_noise(case.logits[:, : case.vocab_size]) if name == "kl" else 0.0
        for actual in joined(ranks, case.name, size, name):
            naive.assert_gradient(actual, expected, bound, noise=noise)
            assert (actual[:, case.vocab_size :] == 0).all()


def test_low_precision_gradients_are_the_exact_ones_rounded(ranks) -> None:
    for rank in ranks:
        assert len(rank["rounded"]) == len(SIZES) * 4
        assert all(rank["rounded"].values())


@pytest.mark.parametrize("size", SIZES)
def test_two_collectives_at_most_and_none_in_backward(ranks, size: int) -> None:
    for rank in ranks:
        for (_, shard_size), shard in rank["shards"].items():
            if shard_size == size:
                assert shard.forward_collectives == (1 if size > 1 else 0)
                assert shard.backward_collectives == 0
        assert rank["part collectives"] == (1, 1)


def test_parts_alone(ranks) -> None:
    case = autograd_case()
    margin = naive.target_margin(case.logits, case.labels)
    kl = naive.reference_kl(case.logits, 2 * case.logits)
    for rank in ranks:
        naive.assert_values(rank["parts"]["margin"], margin, 1e-5, floor=1.0)
        naive.assert_values(rank["parts"]["kl"], kl, 1e-5)


def test_bad_label_raises_on_every_rank(ranks) -> None:
    """Nobody is left waiting: the ranks went on to other collectives after it."""
    expected = [f"labels must be in 0..15, got {bad} at position (3,)" for bad in (-1, 16)]
    assert [rank["errors"] for rank in ranks] == [expected] * WORLD


def test_autograd_through_an_all_reduce_fails(ranks) -> None:
    """Its values are right and its gradient is `tp` times the true one; the counter sees both."""
    case = autograd_case()
    z = case.logits.double().requires_grad_()
    truth = naive.target_margin(z, case.labels)
    (expected,) = torch.autograd.grad(naive.softplus(truth).sum(), z)
    for rank in ranks:
        margin, _, forward, backward = rank["autograd"]
        naive.assert_values(margin, truth.detach(), 1e-5, floor=1.0)
        assert (forward, backward) == (3, 2)
    gradient = torch.cat([rank["autograd"][1] for rank in ranks], -1)
    with pytest.raises(AssertionError, match="beyond the bound"):
        naive.assert_gradient(gradient, expected, 1e-5)
    naive.assert_gradient(gradient / WORLD, expected, 1e-5)


def fails_on(rank: int) -> None:
    if dist.get_rank() == rank:
        raise KeyError("the rank's own words")
    dist.barrier()


def test_run_ranks_reports_the_rank_that_failed() -> None:
    with pytest.raises(RankError, match=r"(?s)rank 1 of 2.*the rank's own words"):
        run_ranks(fails_on, 2, 1)


def sleeps() -> None:
    torch.multiprocessing.get_context("spawn").Event().wait()


def test_run_ranks_ends_what_takes_too_long() -> None:
    with pytest.raises(TimeoutError, match=r"ranks \[0\] of 1 still run after 5"):
        run_ranks(sleeps, 1, timeout=5.0)
