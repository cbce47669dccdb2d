"""Megatron-Core where there is no Triton, as on macOS: in processes where importing it fails."""

import subprocess
import sys

import pytest

from tests.helpers.entry import ROOT

HIDDEN = "import sys; sys.modules['triton'] = None\n"
KERNEL = """
import megatron.training
from megatron.core.transformer.moe.ops import paged_stash
try:
    paged_stash.paged_stash_copy_kernel[(1,)](None)
except ImportError as error:
    print(error)
"""


def run(code: str) -> subprocess.CompletedProcess:
    """What a new process does."""
    return subprocess.run(
        [sys.executable, "-c", HIDDEN + code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_megatron_alone_cannot_be_imported():
    """If it can, one day, the stand-in has done its work."""
    error = run("import megatron.core").stderr.splitlines()[-1]
    assert error.startswith("ModuleNotFoundError: import of triton halted")


def test_behind_this_package_it_can_and_its_kernels_say_what_is_missing():
    result = run("import megatron_ext" + KERNEL)
    assert result.returncode == 0, result.stderr
    assert result.stdout == (
        "megatron.core.transformer.moe.ops.paged_stash.paged_stash_copy_kernel needs Triton, which is "
        "not installed\n"
    )


def test_the_entry_point_starts():
    code = "import runpy; sys.argv = ['pretrain_unlearn.py', '--help']\n"
    result = run(code + "runpy.run_path('pretrain_unlearn.py', run_name='__main__')")
    assert result.returncode == 0, result.stderr
    assert "--forget-data-path" in result.stdout


def test_where_there_is_a_triton_nothing_is_added():
    pytest.importorskip("triton")
    code = "import sys; before = list(sys.meta_path); import megatron_ext; print(sys.meta_path == before)"
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert found.stdout == "True\n"
