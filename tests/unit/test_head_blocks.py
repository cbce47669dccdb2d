"""How much of the logits the fused head holds at a time, and what it makes twice."""

from types import SimpleNamespace

import pytest
import torch

from megatron_ext.losses import head_memory, head_plan
from megatron_ext.losses.head import unlearning_head
from megatron_ext.losses.head_memory import REFERENCE_CHUNK, memory_budget, plan_blocks
from tests.unit.test_head import ROLES, T, V, actual, assert_same, expected, inputs


def record_products(monkeypatch):
    """Tokens and weight of every product that makes logits, from now on."""
    calls = []
    original = head_plan.project

    def counted(hidden, weight, **options):
        calls.append((hidden.shape[0], weight))
        return original(hidden, weight, **options)

    monkeypatch.setattr(head_plan, "project", counted)
    return calls


def sizes(calls):
    return [(rows, weight.shape[0]) for rows, weight in calls]


def test_blocks_follow_the_budget():
    def plan(budget, references=0, block=None):
        return plan_blocks(8192, 1000, references, element_size=2, budget=budget, block=block)

    assert plan(8192 * 2000) == (8192, 1000, True)  # all fits
    assert plan(8192 * 2000 - 1) == (8192, 768, False)  # not quite: a multiple of the tile
    assert plan(8192 * 2000, block=8192 * 512) == (8192, 1000, True)
    assert plan(8192 * 2000 - 1, block=8192 * 512) == (8192, 256, False)
    # All of the student's, not the reference's.
    assert plan(8192 * 4000 - 1, 8192) == (8128, 1000, True)
    assert plan((8192 + REFERENCE_CHUNK) * 2000 - 1, 8192) == (8192, 512, False)
    assert plan(8192 * 3000, 4096) == (8192, 1000, True)  # half of the tokens have a reference
    # Too many tokens for a tile of columns.
    assert plan(8192 * 512 - 1) == (8128, 256, False)
    assert plan(8192 * 512, 8192) == (4096, 256, False)
    assert plan(5 * 512) == (5, 256, False)
    assert plan(0) == (1, 256, False)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("roles", ["mixed", "replay"])
def test_reference_in_chunks_beside_kept_logits(roles, dtype, monkeypatch):
    monkeypatch.setattr(head_memory, "REFERENCE_CHUNK", 3)
    arguments = inputs(dtype, roles=roles)
    calls = record_products(monkeypatch)
    references = ROLES[roles].count(1)
    options = {"fp32_logits": dtype == torch.bfloat16}
    element = 4 if options["fp32_logits"] else arguments["weight"].element_size()
    found = actual(arguments, memory_budget_bytes=(T + 5) * V * element, **options)
    assert_same(found, expected(arguments), 1e-6 if dtype == torch.float64 else 2e-2)
    of = [(rows, weight is arguments["weight"]) for rows, weight in calls]
    student = [rows for rows, is_student in of if is_student]
    reference = [rows for rows, is_student in of if not is_student]
    assert student == [T]  # once
    # Twice, but for the chunk that is there when backward begins.
    assert max(reference) == 5
    assert sum(reference) == 2 * references - 5


@pytest.mark.parametrize(
    ("options", "made"),
    [
        ({"chunk_size": 12}, [(12, V), (12, V), (5, V)]),
        ({"memory_budget_bytes": T * 36 * 8}, [(T, 36), (T, 36), (T, 16)]),
        (
            {"memory_budget_bytes": 20 * 9 * 8},
            [(n, v) for n in (20, 9) for v in [9] * 9 + [7]],
        ),
    ],
    ids=["tokens", "columns", "both"],
)
def test_backward_keeps_the_last_block_of_forward(options, made, monkeypatch):
    monkeypatch.setattr(head_memory, "COLUMNS_TILE", 9)
    calls = record_products(monkeypatch)
    arguments = inputs() | {"reference_hidden": None, "reference_weight": None}
    out = unlearning_head(**arguments, **options)
    assert sizes(calls) == [*made[1:], made[0]]
    out.margin.sum().backward()
    assert sizes(calls)[len(made) :] == made[1:]


def test_little_memory_is_taken_where_nothing_is_kept(monkeypatch):
    gib = 2**30
    allocator = {f"{name}_bytes": {"all": {"current": 0}} for name in ("reserved", "allocated")}
    monkeypatch.setattr(torch.cuda, "memory_stats_as_nested_dict", lambda device: allocator)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (40 * gib, 80 * gib))
    properties = SimpleNamespace(total_memory=80 * gib)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)

    def budget(needed, *, kept):
        return memory_budget(torch.device("cuda"), needed=needed * gib, kept=kept) / gib

    assert budget(20, kept=True) == 20
    assert budget(30, kept=True) == pytest.approx(24)  # 60% of what is free
    assert budget(20, kept=False) == 5
    assert budget(2, kept=False) == 2
