"""Attention over a sequence that is split across ranks, against attention to the whole of it."""

from functools import partial
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from tests.helpers.distributed import run_ranks
from tests.helpers.live_memory import LiveMemory

BATCH, HEADS, HEAD_SIZE = 2, 4, 8
RANKS = 4
# Tokens of a sequence and key heads; the shortest has one token a chunk.
CASES = [(8, 4), (24, 2), (64, 1)]


def _chunks(whole: Tensor) -> Tensor:
    """This rank's chunks of the sequence, as Megatron deals them out."""
    from megatron.core.utils import get_batch_on_this_cp_rank

    batch = get_batch_on_this_cp_rank(
        {"tokens": whole.transpose(0, 1).contiguous()},
        is_hybrid_cp=False,
        cp_group=dist.group.WORLD,
    )
    return batch["tokens"].transpose(0, 1)


def _core(ranks: int) -> Any:
    from megatron.core.transformer.enums import AttnBackend, AttnMaskType

    from megatron_ext.model.attention import SdpaCoreAttention

    config = SimpleNamespace(
        attention_dropout=0.0, attention_backend=AttnBackend.auto, context_parallel_size=ranks
    )
    return SdpaCoreAttention(
        config,
        1,
        attn_mask_type=AttnMaskType.causal,
        attention_type="self",
        pg_collection=SimpleNamespace(cp=dist.group.WORLD),
    )


def _tensors(sequence: int, groups: int) -> list[Tensor]:
    """Queries, keys, values and the gradient of the context, of the whole sequence."""
    generator = torch.Generator().manual_seed(sequence)
    draw = partial(torch.randn, generator=generator, dtype=torch.float64)
    return [draw(sequence, BATCH, heads, HEAD_SIZE) for heads in (HEADS, groups, groups, HEADS)]


def _outputs(attention: Any, tensors: list[Tensor], *, passes: int = 1) -> list[Tensor]:
    """Context, and gradients of queries, keys and values."""
    inputs = [t.detach().clone().requires_grad_() for t in tensors[:3]]
    context = attention(*inputs)
    for i in range(passes):
        retain = i + 1 < passes
        gradients = torch.autograd.grad(context, inputs, tensors[3].flatten(2), retain_graph=retain)
    return [context.detach(), *gradients]


def _differences(sequence: int, groups: int, *, passes: int = 1) -> list[float]:
    whole = _tensors(sequence, groups)
    expected = [_chunks(t) for t in _outputs(_core(1), whole)]
    found = _outputs(_core(RANKS), [_chunks(t) for t in whole], passes=passes)
    return [float((a - b).abs().max()) for a, b in zip(found, expected, strict=True)]


def _kept() -> tuple[float, float]:
    """What a forward pass leaves behind, over the gathered keys and values: ours, and with these kept."""
    from megatron_ext.model import context_parallel

    tensors = [_chunks(t).requires_grad_() for t in _tensors(256, HEADS)[:3]]
    gathered = 2 * tensors[1].nbytes * RANKS

    def left() -> float:
        with LiveMemory() as memory:
            context = _core(RANKS)(*tensors)
            return (memory.now - context.nbytes) / gathered

    ours = left()
    with mock.patch.object(context_parallel._Regathered, "pack", lambda _, saved: saved):
        return ours, left()


def _collectives() -> dict[str, int]:
    counts = dict.fromkeys(("all_gather_into_tensor", "reduce_scatter_tensor"), 0)

    def counted(name: str) -> Any:
        original = getattr(dist, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            counts[name] += 1
            return original(*args, **kwargs)

        return mock.patch.object(torch.distributed, name, call)

    with counted("all_gather_into_tensor"), counted("reduce_scatter_tensor"):
        _outputs(_core(RANKS), [_chunks(t) for t in _tensors(64, 2)])
    return counts


def _wrong_order() -> float:
    """Ranks that take neighbouring chunks, where Megatron deals out the first and the last."""
    whole = _tensors(64, 4)
    neighbours = [t.chunk(RANKS)[dist.get_rank()].contiguous() for t in whole]
    expected = _outputs(_core(1), whole)[0].chunk(RANKS)[dist.get_rank()]
    return float((_outputs(_core(RANKS), neighbours)[0] - expected).abs().max())


def _everything() -> dict[str, Any]:
    from megatron_ext.runtime import cpu

    cpu.enable()
    return {
        "differences": [_differences(*case) for case in CASES],
        "twice": _differences(24, 2, passes=2),
        "kept": _kept(),
        "collectives": _collectives(),
        "wrong order": _wrong_order(),
    }


@pytest.fixture(scope="module")
def results():
    return run_ranks(_everything, RANKS)


def test_context_and_gradients_are_those_of_the_whole_sequence(results):
    # fp64; sums over at most 64 keys and RANKS ranks.
    for rank in results:
        assert max(max(differences) for differences in rank["differences"]) < 1e-13


def test_a_graph_may_be_gone_back_through_twice(results):
    assert max(max(rank["twice"]) for rank in results) < 1e-13


def test_gathered_keys_and_values_are_not_kept(results):
    """Else every rank would hold those of the whole sequence for each layer."""
    for ours, kept in (rank["kept"] for rank in results):
        assert kept > 1
        # The contexts of the two chunks, a quarter of a sequence's keys here, and statistics.
        assert ours < kept - 0.99


def test_one_gather_forward_and_one_with_one_reduction_backward(results):
    for rank in results:
        assert rank["collectives"] == {"all_gather_into_tensor": 2, "reduce_scatter_tensor": 1}


def test_chunks_in_another_order_would_be_found_out(results):
    assert max(rank["wrong order"] for rank in results) > 0.1
