import math
import subprocess
import sys

import pytest
from torch.utils.tensorboard import SummaryWriter

from megatron_ext.analysis.scalars import (
    compare,
    format_scalars,
    parse_scalars,
    relative_difference,
)
from megatron_ext.exceptions import DataError
from tests.helpers.entry import ROOT

SCALARS = {"a": {1: 1.00000012, 2: -2e-9}, "b": {1: 3.0, 2: 4e20}}


def tool(*arguments):
    command = [sys.executable, str(ROOT / "tools" / "compare_losses.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


def test_text_keeps_all_digits_of_fp32():
    text = format_scalars(SCALARS, tags=("a", "b"), comment="two\nlines")
    assert text.startswith("# two\n# lines\nstep\ta\tb\n")
    assert parse_scalars(text, name="x") == SCALARS


def test_tags_of_other_steps_stand_beside_each_other():
    """As a directory has them in which one stage followed another."""
    stages = {"lm loss": {1: 3.0, 2: 2.0}, "unlearn loss": {3: 1.0}}
    text = format_scalars(stages, tags=tuple(stages))
    assert text.splitlines()[1:] == ["1\t3\t", "2\t2\t", "3\t\t1"]
    assert parse_scalars(text, name="x") == stages


@pytest.mark.parametrize(
    "text", ["", "no header", "step\ta\n1\t2\t3", "step\ta\n1\tx", "step\ta\nx\t1"]
)
def test_broken_text_is_named(text):
    with pytest.raises(DataError, match="file"):
        parse_scalars(text, name="file")


@pytest.mark.parametrize(
    ("expected", "found", "difference"),
    [
        *((1, 1, 0), (0, 0, 0), (2, 1, 0.5), (1, 2, 0.5), (-1, 1, 2), (math.nan, 1, math.inf)),
        *((math.inf, 1, math.inf), (math.inf, -math.inf, math.inf), (math.inf, math.inf, 0)),
    ],
)
def test_relative_difference(expected, found, difference):
    assert relative_difference(expected, found) == difference


def test_the_worst_step_counts_and_a_missing_one_is_worse():
    found = {"a": {1: 1.00000012, 2: -1e-9}, "b": {1: 3.0}}
    assert compare(SCALARS, found, tags=("a", "b")) == {"a": 0.5, "b": math.inf}


def test_the_command_line(tmp_path):
    for name, value in (("one", 3.0), ("same", 3.00001), ("other", 3.1)):
        (tmp_path / name).write_text(f"step\tlm loss\n1\t2\n2\t{value}\n")
    same = tool(tmp_path / "one", tmp_path / "same")
    assert same.returncode == 0
    assert "3.33e-06 over 2 steps" in same.stdout
    assert tool(tmp_path / "one", tmp_path / "other").returncode == 1
    assert tool(tmp_path / "one", tmp_path / "other", "--tolerance", 0.1).returncode == 0
    assert tool(tmp_path / "one", "--write").stdout == (tmp_path / "one").read_text().replace(
        "3.0", "3"
    )
    (tmp_path / "endless").write_text("step\tlm loss\n1\t2\n2\tinf\n")
    assert tool(tmp_path / "one", tmp_path / "endless").returncode == 1
    refused = tool(tmp_path / "one", tmp_path / "other", "--tolerance", "nan")
    assert refused.returncode == 2
    assert "--tolerance: expected 0 or more, found nan" in refused.stderr
    (tmp_path / "head").write_text("step\tlm loss\n")
    empty = tool(tmp_path / "head", tmp_path / "head")
    assert empty.returncode == 2
    assert "head: expected values of lm loss" in empty.stderr
    missing = tool(tmp_path / "one", tmp_path / "none")
    assert missing.returncode == 2
    assert "none" in missing.stderr
    assert "Traceback" not in missing.stderr


def test_what_one_run_alone_has_is_said(tmp_path):
    runs = {
        "one": {"lm loss": {1: 2.0, 2: 3.0}, "forget loss": {1: 0.5, 2: 0.25}},
        "other": {"lm loss": {2: 3.0, 3: 4.0, 4: 5.0}, "replay loss": {1: 0.5}},
    }
    for name, scalars in runs.items():
        (tmp_path / name).write_text(format_scalars(scalars, tags=tuple(scalars)))
    result = tool(tmp_path / "one", tmp_path / "other")
    assert result.returncode == 1
    lines = [" ".join(line.split()) for line in result.stdout.splitlines()]
    assert lines[1:-1] == [
        "lm loss 1 2 - 0.00e+00 over 1 steps, 1 only in the first, 2 only in the second",
        "4 - 5",
        "forget loss 1 0.5 - only in the first",
        "2 0.25 -",
        "replay loss 1 - 0.5 only in the second",
    ]
    assert lines[-1] == "the runs differ by more than 1e-05"


def test_tensorboard_says_nothing_of_a_resumed_run(tmp_path):
    for number, steps in enumerate([(1, 2, 3), (3, 4), (4, 5)]):  # what was lost is written again
        with SummaryWriter(str(tmp_path / "new")) as writer:
            for step in steps:
                writer.add_scalar("lm loss", step + number / 4, step)
        (tmp_path / "run").mkdir(exist_ok=True)
        (written,) = (tmp_path / "new").iterdir()
        written.rename(tmp_path / "run" / f"events.out.tfevents.{number}")
    result = tool(tmp_path / "run", "--write")
    assert result.stdout == "step\tlm loss\n1\t1\n2\t2\n3\t3.25\n4\t4.5\n5\t5.5\n"
    assert result.stderr == ""


def test_a_file_that_is_no_text_is_named(tmp_path):
    """Exit code 1 would say that the runs differ."""
    (tmp_path / "events").write_bytes(b"\xff\xfe\x00")
    result = tool(tmp_path / "events", "--write")
    assert (result.returncode, len(result.stderr.splitlines())) == (2, 1)
    assert "events: expected a TensorBoard directory or a text file" in result.stderr


def test_a_folder_without_event_files_is_named(tmp_path):
    one = tmp_path / "one.txt"
    one.write_text(format_scalars(SCALARS, tags=("a",)))
    (tmp_path / "empty").mkdir()
    result = tool(one, tmp_path / "empty", "--tags", "a")
    assert result.returncode == 2
    assert (
        f"{tmp_path / 'empty'}: expected a folder with TensorBoard's event files" in result.stderr
    )
