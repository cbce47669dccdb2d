"""What worker processes do with memory."""

import ctypes
import subprocess
import sys

import pytest

PAGES = 40 * 2**20 // 4096
# Faults of ten rounds in which 40 MiB are asked for, written and freed, after three that warm up.
PROGRAM = """
import resource, sys
from megatron_ext.data.workers import keep_memory
if sys.argv[1] == "keep":
    keep_memory()
def take():
    blocks = [bytearray(4 << 20) for _ in range(10)]
    for block in blocks:
        block[::4096] = b"x" * len(block[::4096])
for _ in range(3):
    take()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    take()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(how):
    command = [sys.executable, "-c", PROGRAM, how]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="not glibc")
def test_freed_memory_is_not_asked_for_again():
    assert faults("keep") < PAGES
    assert faults("as it is") > 5 * PAGES  # of 10 rounds; else the option is needed no longer
