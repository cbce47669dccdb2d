"""The plan's activations and head against what steps of real models allocate on two ranks."""

import json
from typing import Any

import pytest

from megatron_ext.planning.activations import layer_bytes_per_token
from megatron_ext.planning.memory import stage_memory
from tests.helpers.entry import ROOT, Launch
from tests.helpers.forked import Server
from tests.helpers.plan_cases import CASES, EACH, LAYERS

STATE = ("weights", "gradients", "optimizer")


@pytest.fixture(scope="module")
def measured(server: Server) -> list[tuple[dict[str, int], list[float]]]:
    """Of each rank the peaks by case, and what a layer of each of `LAYERS` keeps."""
    script = ROOT / "tests" / "helpers" / "plan_cases.py"
    [(code, output)] = server.results([Launch((), ranks=2, script=script)])
    assert code == 0, output
    found: list[Any] = [
        json.loads(line.removeprefix("measured "))
        for line in output.splitlines()
        if line.startswith("measured ")
    ]
    return [(peaks, layers) for _, peaks, layers in sorted(found)]


@pytest.mark.parametrize("name", CASES)
def test_a_step_allocates_what_the_plan_says(name, measured):
    arch, layout = CASES[name]
    assert len(measured) == 2
    for rank, (peaks, _) in enumerate(measured):
        parts = stage_memory(arch, layout, layout.place(rank)[0]).parts
        planned = sum(size for part, size in parts.items() if part not in STATE)
        assert planned == pytest.approx(peaks[name], rel=0.1)


def test_a_layer_keeps_exactly_what_the_plan_says(measured):
    planned = [layer_bytes_per_token(arch, EACH, arch.kind(0)) for arch in LAYERS]
    assert [kept for _, kept in measured] == [planned, planned]
