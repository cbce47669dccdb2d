"""Runs in which the head takes its gradients chunk by chunk, against those in which all logits fit."""

import pytest

from megatron_ext.analysis.scalars import compare
from tests.helpers.entry import LOSSES, ROOT, Launch
from tests.integration.conftest import SHARDED, STEPS, TRAIN

TP2 = ("--tensor-model-parallel-size", 2)
# Small buckets, so that the output layer's weight is gathered and its gradient reduced by itself.
OVERLAPPED = ("--overlap-grad-reduce", "--overlap-param-gather", "--ddp-bucket-size", 5000)
LAYOUTS: dict[str, tuple[int, tuple[object, ...]]] = {
    "one rank": (1, ()),
    "TP 2, sequence parallel": (2, (*TP2, "--sequence-parallel")),
    "PP 2": (2, ("--pipeline-model-parallel-size", 2)),
    "DP 2, overlapped": (2, (*SHARDED, *OVERLAPPED)),
}
# Sums in another order, in fp32, as between layouts.
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def chunked(tiny, server, runs_directory):
    script = ROOT / "tests" / "helpers" / "chunked_head.py"
    launches = {
        name: Launch(tiny.unlearn(*TRAIN, *layout), ranks=ranks, script=script)
        for name, (ranks, layout) in LAYOUTS.items()
    }
    plain = tiny.plain("--train-iters", STEPS)
    launches["plain, all fit"] = Launch(plain)
    launches["plain"] = Launch(plain, script=script)
    return server.run_all(launches, runs_directory / "chunked")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_unlearning_is_the_same(layout, chunked, straight):
    assert "head: chunks of 64 of 128 tokens" in chunked[layout].output
    tags = (*LOSSES, *(f"{loss} validation" for loss in LOSSES), "grad-norm")
    found = compare(straight.scalars, chunked[layout].scalars, tags=tags)
    assert max(found.values()) <= TOLERANCE, found


def test_plain_training_is_the_same(chunked):
    assert "head: chunks of 64 of 128 tokens" in chunked["plain"].output
    tags = ("lm loss", "grad-norm")
    found = compare(chunked["plain, all fit"].scalars, chunked["plain"].scalars, tags=tags)
    assert max(found.values()) <= TOLERANCE, found
