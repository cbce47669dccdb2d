"""A handful of the faults of `make faults`, one of each of the kinds that are cheap to start."""

import subprocess
import sys

from tests.helpers.entry import ROOT

KINDS = (
    "kill in a checkpoint's write",
    "fill the disk",
    "truncate a checkpoint's file",
    "lose the tracker file",
)


def test_disturbed_runs_end_as_undisturbed_ones_do(tiny):
    options = ["--faults", "4", "--seed", "3", "--world", str(tiny.directory)]
    options += ["--layouts", "DP 2, distributed optimizer", "--kinds", *KINDS]
    result = subprocess.run(
        [sys.executable, "-m", "tests.faults.run", *options],
        **{"cwd": ROOT, "text": True, "timeout": 600},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    assert result.returncode == 0, result.stdout
    assert result.stdout.splitlines()[-1].startswith("4 faults in ")
