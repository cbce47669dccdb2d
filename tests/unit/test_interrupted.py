"""A run that Ctrl-C ends says which of its checkpoints there is."""

import subprocess
import sys

import pytest

from tests.helpers.entry import ENTRY, ROOT

# In a process of its own, for the entry point leaves at once.
PROGRAM = f"""
import runpy, sys, types
from argparse import Namespace

class Run:
    @staticmethod
    def run(*, program_start):
        import megatron.training.global_vars as state
        if sys.argv[1:]:
            state._GLOBAL_ARGS = Namespace(save=sys.argv[1] or None, skip_train=len(sys.argv) > 2)
        raise KeyboardInterrupt

sys.modules["megatron_ext.run"] = Run
sys.argv[0] = "pretrain_unlearn.py"
runpy.run_path({str(ENTRY)!r}, run_name="__main__")
"""


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    (folder / "latest_checkpointed_iteration.txt").write_text("500")
    return folder


@pytest.mark.parametrize(
    ("name", "more", "message"),
    [
        ("", (), "; the last iteration saved in --save {} is 500"),
        ("none", (), "; --save {} holds no checkpoint"),
        ("", ("skip",), ""),
        (None, (), ""),
    ],
)
def test_the_last_line_names_the_iteration_that_was_saved(saved, name, more, message):
    folder = "" if name is None else str(saved / name)
    command = [sys.executable, "-c", PROGRAM, folder, *more]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    last = done.stderr.splitlines()[-1]
    assert (done.returncode, last) == (
        130,
        f"pretrain_unlearn.py: interrupted{message.format(folder)}",
    )


def test_before_the_flags_are_read_there_is_nothing_to_say():
    done = subprocess.run([sys.executable, "-c", PROGRAM], cwd=ROOT, capture_output=True, text=True)
    assert done.stderr.splitlines()[-1] == "pretrain_unlearn.py: interrupted"
