"""The plan's own flags stand before --; behind it they would change nothing."""

import argparse
import sys

import pytest

from megatron_ext.exceptions import ConfigError
from tests.helpers.entry import ROOT
from tests.unit.test_plan_run import MODEL
from tools import plan_run


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["--rank-layouts", "3"],
            "--rank-layouts: expected flags of the run behind --, found one of ",
        ),
        (["--price=5"], "--price=5: expected .*: put it before --$"),
        (["--check"], "--check: .*: put it before --$"),
        (
            ["--rank-layout", "3"],
            "--rank-layout: expected --rank-layouts before --, found an unknown",
        ),
        (
            ["--write_bandwith=5"],
            "--write_bandwith=5: expected --write-bandwidth before --, found ",
        ),
    ],
)
def test_flags_of_the_tool_behind_two_dashes_are_refused(words, message, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["plan_run.py", "--gpus", "2", "--", *MODEL, *words])
    with pytest.raises(ConfigError, match=f"^{message}"):
        plan_run.main()


def test_no_flag_of_a_run_is_taken_for_one_of_the_tool():
    from megatron.training.arguments import add_megatron_arguments

    from megatron_ext.arguments import add_arguments

    parser = add_arguments(add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False)))
    plan_run.refuse_own([flag for flag in parser._option_string_actions if flag != "--help"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "--peak-flops: expected with --gpu-type CPU, found none"),
        (
            ["--peak-flops", "1e11", "--rank-layouts", "3"],
            "--rank-layouts: .* and links, found CPU",
        ),
    ],
)
def test_what_a_plan_for_cpus_needs_and_refuses_is_documented(words, message, monkeypatch):
    monkeypatch.setattr(
        sys, "argv", ["plan_run.py", "--gpus", "2", "--gpu-type", "CPU", *words, "--", *MODEL]
    )
    with pytest.raises(ConfigError, match=f"^{message}$"):
        plan_run.main()
    [line] = [
        line
        for line in (ROOT / "docs" / "planning.md").read_text().splitlines()
        if line.startswith("| `--gpu-type` |")
    ]
    assert "`CPU`, which needs `--peak-flops` and refuses `--rank-layouts`" in line
