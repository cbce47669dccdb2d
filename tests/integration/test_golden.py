"""Losses of fixed runs, as they were when somebody last looked at them.

A change here is a change of what is trained: review it like code. To write the files anew:

    GOLDEN_WRITE=1 python -m pytest tests/integration/test_golden.py
"""

import os

import pytest

from megatron_ext.analysis.scalars import compare, format_scalars, read_scalars
from tests.helpers.entry import LOSSES, ROOT

GOLDEN = ROOT / "tests" / "integration" / "golden"
# Other CPUs sum in another order: 1e-7 in the first step, more with each step that Adam makes of it. A
# change of the data, the seeds or the objective is beyond 1e-3.
TOLERANCE = 1e-4


@pytest.mark.parametrize("name", ["plain", "unlearn"])
def test_losses_are_the_golden_ones(name, tiny, straight):
    tags = ("lm loss",) if name == "plain" else LOSSES
    tags = (*tags, "grad-norm")
    scalars = {
        "plain": read_scalars(tiny.directory / "tensorboard" / "base"),
        "unlearn": straight.scalars,
    }[name]
    file = GOLDEN / f"{name}.txt"
    if os.environ.get("GOLDEN_WRITE"):
        comment = f"Losses of the run '{name}' of tests/integration, fp32, one rank of a CPU."
        file.write_text(format_scalars(scalars, tags=tags, comment=comment))
    for tag, difference in compare(read_scalars(file), scalars, tags=tags).items():
        assert difference <= TOLERANCE, tag
