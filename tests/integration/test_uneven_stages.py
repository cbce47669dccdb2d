"""Runs whose pipeline stages have not all the same kinds of parameters go on bit for bit."""

import pytest

from tests.helpers.entry import Launch
from tests.helpers.tiny import at_iteration

STEPS, HALF = 4, 2
TAGS = ("lm loss", "grad-norm")
SHARDED = ("--use-distributed-optimizer", "--dist-ckpt-optim-fully-reshardable")
STAGES = ("--pipeline-model-parallel-size", 2)
EXPERTS = (
    *("--num-experts", 2, "--moe-ffn-hidden-size", 40),
    *("--moe-router-topk", 1, "--moe-router-pre-softmax"),
    *("--moe-token-dispatcher-type", "alltoall", "--expert-model-parallel-size", 2),
)
LATE = (*STAGES, *EXPERTS, "--moe-layer-freq", "[0,0,1,1]")  # the first stage is dense
EARLY = (*STAGES, *EXPERTS, "--moe-layer-freq", "[1,1,0,0]")
DISTRIBUTED = "first stage without experts, distributed"
RUNS = {
    "first stage without norms": (
        2,
        (*STAGES, "--bf16", "--pipeline-model-parallel-layout", "E|ttttL"),
    ),
    # Of the three groups of weights it has the first and the last.
    "last stage with norm and decoupled weight": (
        2,
        (*STAGES, "--bf16", "--pipeline-model-parallel-layout", "Etttt|L", "--decoupled-lr", 5e-4),
    ),
    "first stage without experts": (4, LATE),
    "first stage without experts, bf16": (4, (*LATE, "--bf16")),
    DISTRIBUTED: (4, (*LATE, *SHARDED)),
    "last stage without experts, bf16": (4, (*EARLY, "--bf16")),
    "last stage without experts, SGD": (4, (*EARLY, "--optimizer", "sgd")),
}


@pytest.fixture(scope="module")
def runs(tiny, server, runs_directory):
    """Each run as a whole, and its second half from the checkpoint in between."""
    train = ("--train-iters", STEPS)
    whole, rest = {}, {}
    for i, (name, (ranks, flags)) in enumerate(RUNS.items()):
        save = runs_directory / f"uneven_{i}"
        saving = ("--save", save, "--save-interval", HALF)
        whole[name] = Launch(tiny.plain(*train, *flags, *saving), ranks=ranks)
    found = server.run_all(whole, runs_directory / "uneven_whole")
    for i, (name, (ranks, flags)) in enumerate(RUNS.items()):
        save = runs_directory / f"uneven_{i}"
        half = at_iteration(save, HALF, runs_directory / f"uneven_half_{i}")
        rest[name] = Launch(tiny.plain(*train, *flags, "--load", half), ranks=ranks)
    half = runs_directory / f"uneven_half_{[*RUNS].index(DISTRIBUTED)}"
    flags = (*LATE[len(STAGES) :], *SHARDED, "--load", half)
    rest["one stage"] = Launch(tiny.plain(*train, *flags), ranks=2)
    return found, server.run_all(rest, runs_directory / "uneven_rest")


@pytest.mark.parametrize("name", RUNS)
def test_a_resumed_run_goes_on_bit_for_bit(runs, name):
    whole, rest = (found[name].scalars for found in runs)
    for tag in TAGS:
        expected = {step: value for step, value in whole[tag].items() if step > HALF}
        assert len(expected) == STEPS - HALF
        assert rest[tag] == expected, tag


def test_another_layout_goes_on(runs):
    expected = runs[0][DISTRIBUTED].scalars
    found = runs[1]["one stage"].scalars
    for tag in TAGS:
        for step in (HALF + 1, HALF + 2):
            # The same sums in another order, in fp32; a step that starts anew changes the loss by 3e-4.
            assert found[tag][step] == pytest.approx(expected[tag][step], rel=1e-5), tag
