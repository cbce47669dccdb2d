"""The plan's activations, cache and head against what steps of real unlearning runs take."""

import re

import pytest

from megatron_ext.planning import flags as entry
from megatron_ext.planning.memory import all_stages
from tests.helpers.entry import ROOT, Launch

STATE = ("weights", "gradients", "optimizer", "reference")
# Microbatches of 256 tokens, so that they outweigh the weights of a model this small.
STEP = ("--train-iters", 2, "--micro-batch-size", 4, "--lr", 1e-3, "--min-lr", 1e-4)
CASES = {
    "one rank": (1, ()),
    "TP 2": (2, ("--tensor-model-parallel-size", 2, "--sequence-parallel")),
    "CP 2": (2, ("--context-parallel-size", 2)),
    "PP 2": (2, ("--pipeline-model-parallel-size", 2)),
    "PP 2, uneven": (
        2,
        ("--pipeline-model-parallel-size", 2, "--decoder-last-pipeline-num-layers", 1),
    ),
}


@pytest.fixture(scope="module")
def outputs(tiny, server) -> dict[str, tuple[int, str]]:
    script = ROOT / "tests" / "helpers" / "live_steps.py"
    launches = [
        Launch(tiny.unlearn(*STEP, *more), ranks=ranks, script=script)
        for ranks, more in CASES.values()
    ]
    return dict(zip(CASES, server.results(launches), strict=True))


@pytest.fixture(scope="module")
def waits(tiny, server) -> dict[str, tuple[int, str]]:
    script = ROOT / "tests" / "helpers" / "stage_waits.py"
    pp2 = ("--train-iters", 2, "--eval-iters", 0, "--pipeline-model-parallel-size", 2)
    chunks = ("--num-virtual-stages-per-pipeline-rank", 2)
    launches = [Launch(tiny.unlearn(*pp2, *more), ranks=2, script=script) for more in ((), chunks)]
    return dict(zip(("1F1B", "interleaved"), server.results(launches), strict=True))


@pytest.mark.parametrize("name", CASES)
def test_a_step_takes_what_the_plan_says(name, outputs, tiny):
    code, output = outputs[name]
    assert code == 0, output
    ranks, more = CASES[name]
    flags = entry.entry_flags([str(word) for word in tiny.unlearn(*STEP, *more)])
    layout = entry.layout(flags, gpus=ranks, cpu=True)
    stages = all_stages(entry.architecture(flags), layout, entry.unlearning(flags))
    for rank in range(ranks):
        found = re.findall(rf"rank {rank} step peak (\d+)", output)
        assert len(found) == 2
        parts = stages[layout.place(rank)[0]].parts
        planned = sum(size for part, size in parts.items() if part not in STATE)
        assert planned == pytest.approx(int(found[-1]), rel=0.1)


@pytest.mark.parametrize("layout", ["1F1B", "interleaved"])
def test_stages_pass_tensors_on_and_wait_for_nothing_else_behind_the_reference(layout, waits):
    """So the student fills the pipeline while the reference drains it, as the model of a step has it."""
    code, output = waits[layout]
    assert code == 0, output
    first, last = (set(re.findall(rf"rank {rank} waits (.*)", output)) for rank in range(2))
    waited = {wait for line in first | last for wait in line.split()}
    assert {wait for wait in waited if not wait.endswith(":1")} == {"send:2", "recv_:2"}
    # The last stage's sum over its copies is seen; here there is one of them.
    assert all("allreduce_:1" in line for line in last)
    assert last
