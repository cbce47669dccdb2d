"""The unlearning run that several tests look at: its steps, its checkpoints, its reference."""

import pytest

from tests.helpers.entry import Launch, Run, run, run_all, succeed
from tests.helpers.forked import Server
from tests.helpers.tiny import Tiny, at_iteration

STEPS, HALF = 10, 5
TRAIN = ("--train-iters", STEPS, "--lr", 1e-3, "--min-lr", 1e-4)
TRAIN = (*TRAIN, "--eval-interval", HALF, "--eval-iters", 2, "--save-interval", HALF)
# Checkpoints of the distributed optimizer that another layout can read.
SHARDED = ("--use-distributed-optimizer", "--dist-ckpt-optim-fully-reshardable")


@pytest.fixture(scope="session")
def straight(tiny: Tiny, runs_directory) -> Run:
    """`STEPS` steps on one rank, saved after half of them and at the end."""
    flags = tiny.unlearn(*TRAIN, "--save", runs_directory / "straight")
    return succeed(run(Launch(flags), runs_directory / "tensorboard" / "straight"))


@pytest.fixture(scope="session")
def halfway(straight: Run, runs_directory):
    """The checkpoint directory as it was after half of the steps."""
    return at_iteration(runs_directory / "straight", HALF, runs_directory / "halfway")


@pytest.fixture(scope="session")
def resumed(tiny: Tiny, server: Server, halfway, runs_directory) -> dict[str, Run]:
    """The second half at the same and at other layouts; none is told again what the reference is."""
    tp2 = ("--tensor-model-parallel-size", 2, *SHARDED)
    even = ("--pipeline-model-parallel-size", 2, *SHARDED)
    uneven = (*even, "--decoder-last-pipeline-num-layers", 1)
    until_half = tiny.unlearn(*TRAIN, "--exit-interval", HALF)
    # Small buckets, so that the output layer's weight is not gathered along with the first layer's.
    overlapped = ("--overlap-grad-reduce", "--overlap-param-gather", "--ddp-bucket-size", 5000)
    everything = (
        *(*overlapped, "--tensor-model-parallel-size", 2, "--sequence-parallel"),
        *("--pipeline-model-parallel-size", 2, "--num-virtual-stages-per-pipeline-rank", 2),
        *("--recompute-granularity", "full", "--recompute-method", "uniform"),
        *("--recompute-num-layers", 1, "--async-save", "--ckpt-fully-parallel-load"),
        *("--reference-offload", "--reference-hidden-offload"),
    )
    first_half = {
        "everything on 4 ranks": Launch(
            (*until_half, *SHARDED, *everything, "--save", runs_directory / "all"), ranks=4
        ),
        "TP 2": Launch((*until_half, *tp2, "--save", runs_directory / "tp2"), ranks=2),
        "PP 2, 3 and 1 layers": Launch(
            (*until_half, *uneven, "--save", runs_directory / "uneven"), ranks=2
        ),
        "DP 2, overlapped": Launch(
            (*until_half, *SHARDED, *overlapped, "--save", runs_directory / "dp2"), ranks=2
        ),
    }
    split = ("--context-parallel-size", 2)
    # The first as a user starts it, with torchrun; the others need not pay for that again.
    with_torchrun = {"everything on 4 ranks": first_half.pop("everything on 4 ranks")}
    runs = run_all(with_torchrun, runs_directory / "first_half")
    runs |= server.run_all(first_half, runs_directory / "first_half")

    def rest(load, *layout):
        return tiny.objective(*TRAIN, "--load", load, *layout)

    launches = {
        "same layout": Launch(rest(halfway)),
        "every key accounted for": Launch(rest(halfway, "--dist-ckpt-strictness", "raise_all")),
        "DP 1 to DP 2": Launch(rest(halfway), ranks=2),
        "TP 2 to PP 2": Launch(rest(runs_directory / "tp2", *even), ranks=2),
        "3 and 1 layers to 2 and 2": Launch(rest(runs_directory / "uneven", *even), ranks=2),
        "DP 2, overlapped, to CP 2": Launch(
            rest(runs_directory / "dp2", *SHARDED, *split), ranks=2
        ),
        "DP 1 to CP 2": Launch(rest(halfway, *split), ranks=2),
        "DP 2, overlapped, to DP 1": Launch(rest(runs_directory / "dp2", *SHARDED)),
        "everything to one rank": Launch(rest(runs_directory / "all", *SHARDED)),
    }
    return runs | server.run_all(launches, runs_directory / "second_half")
