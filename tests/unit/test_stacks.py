"""A run that hangs shows where: SIGUSR2 has the stacks of its threads written, and does not end it."""

import subprocess
import sys

from tests.helpers.entry import ENTRY, ROOT

PROGRAM = f"""
import os, runpy, signal, sys, types

def hang():
    os.kill(os.getpid(), signal.SIGUSR2)
    sys.exit(3)

sys.modules["megatron_ext.runtime.collector"] = types.SimpleNamespace(paused=hang)
runpy.run_path({str(ENTRY)!r}, run_name="__main__")
"""


def test_the_signal_shows_the_stacks_and_ends_nothing():
    command = [sys.executable, "-c", PROGRAM]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 3
    assert 'in hang\n  File "' in done.stderr
    assert 'pretrain_unlearn.py", line' in done.stderr
