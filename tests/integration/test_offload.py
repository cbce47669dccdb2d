"""A reference on the host, its weights or its hidden states, is the same reference."""

import pytest

from tests.helpers.entry import METRICS, Launch
from tests.integration.conftest import TRAIN

OFFLOADS = ("--reference-offload", "--reference-hidden-offload")


@pytest.fixture(scope="module")
def offloaded(tiny, server, runs_directory):
    """The run of `straight` with each of the flags."""
    launches = {flag: Launch(tiny.unlearn(*TRAIN, flag)) for flag in OFFLOADS}
    return server.run_all(launches, runs_directory / "offload")


@pytest.mark.parametrize("flag", OFFLOADS)
def test_offload_changes_no_digit(offloaded, straight, flag):
    assert offloaded[flag].digest() == straight.digest()
    for name in METRICS:
        assert offloaded[flag].series(name) == straight.series(name)
    # Nor is the objective without the reference: that its KL counts here is shown by its size.
    assert min(straight.series("mitigation kl")) > 1e-4
