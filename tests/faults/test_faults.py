"""A handful of the faults of `make faults`: those that are cheap to start, and the end of a writer."""

import subprocess
import sys

import pytest

from tests.helpers.entry import ROOT

CHEAP = (
    "kill in a checkpoint's write",
    "fill the disk",
    "truncate a checkpoint's file",
    "lose the tracker file",
)


@pytest.mark.parametrize(
    ("layout", "kinds"),
    [
        ("DP 2, distributed optimizer", CHEAP),
        ("TP 2, asynchronous saves", ("kill what a rank has started",)),
    ],
)
def test_disturbed_runs_end_as_undisturbed_ones_do(tiny, layout, kinds):
    options = ["--faults", str(len(kinds)), "--seed", "3", "--world", str(tiny.directory)]
    options += ["--layouts", layout, "--kinds", *kinds]
    result = subprocess.run(
        [sys.executable, "-m", "tests.faults.run", *options],
        **{"cwd": ROOT, "text": True, "timeout": 600},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    assert result.returncode == 0, result.stdout
    assert result.stdout.splitlines()[-1].startswith(f"{len(kinds)} faults in ")
