"""A reference on the host is the same reference."""

from tests.helpers.entry import METRICS, Launch, run, succeed
from tests.integration.conftest import TRAIN


def test_offload_changes_no_digit(tiny, straight, runs_directory):
    launch = Launch(tiny.unlearn(*TRAIN, "--reference-offload"))
    offloaded = succeed(run(launch, runs_directory / "offload"))
    assert offloaded.digest() == straight.digest()
    for name in METRICS:
        assert offloaded.series(name) == straight.series(name)
    # Nor is the objective without the reference: that its KL counts here is shown by its size.
    assert min(straight.series("mitigation kl")) > 1e-4
