"""What the terminal shows: news, and numbers with a meaning."""

import argparse
import logging
import os
import subprocess
import sys
import warnings
from types import SimpleNamespace

import megatron.training.training as loop
import pytest

from megatron_ext.arguments import add_arguments
from megatron_ext.runtime import console
from tests.helpers.entry import ROOT


@pytest.fixture
def lines(monkeypatch):
    """What Megatron's last rank prints."""
    printed = []
    monkeypatch.setattr(loop, "print_rank_last", printed.append)
    return printed


def test_validation_shows_the_perplexity_of_cross_entropies_alone(lines):
    console.repair_validation_log()
    loop.print_rank_last(
        " validation loss at iteration 3 | lm loss value: 1.000000E+00 | lm loss PPL: 2.718282E+00 | "
        "mitigation kl value: 0.000000E+00 | mitigation kl PPL: 1.000000E+00 | "
        "replay perplexity value: 7.000000E+00 | replay perplexity PPL: 1.096633E+03 | "
    )
    loop.print_rank_last(" iteration 3 | x PPL: 1 | ")
    assert lines == [
        " validation loss at iteration 3 | lm loss value: 1.000000E+00 | lm loss PPL: 2.718282E+00 | "
        "mitigation kl value: 0.000000E+00 | replay perplexity value: 7.000000E+00 | ",
        " iteration 3 | x PPL: 1 | ",
    ]


def test_memory_is_reported_at_the_first_two_lines_of_a_run(monkeypatch, lines):
    monkeypatch.setattr(loop, "get_args", lambda: SimpleNamespace(log_interval=2))
    # As Megatron answers in a run that began with the weights of iteration 70,000.
    monkeypatch.setattr(loop, "training_log", lambda *_, **__: True)
    console.repair_training_log()

    def report_again(iteration):
        first = iteration == 1
        return loop.training_log({}, {}, 0.1, iteration, 1.0, True, 0, is_first_iteration=first)

    assert [report_again(iteration) for iteration in (1, 2)] == [True, False]
    monkeypatch.setattr(loop, "get_args", lambda: SimpleNamespace(log_interval=3))
    assert [report_again(iteration) for iteration in (1, 2, 3)] == [True, True, False]


@pytest.mark.parametrize(("skipped", "average"), [(0, -4), (1, -1.5)])
def test_an_average_below_zero_is_of_the_steps_that_were_not_skipped(monkeypatch, skipped, average):
    printed = []
    monkeypatch.setattr(loop, "get_args", lambda: SimpleNamespace(log_interval=1))
    monkeypatch.setattr(loop, "print_rank_last", printed.append)
    monkeypatch.setattr(loop, "training_log", lambda *_, **__: True)
    console.repair_training_log()
    totals = {"advanced iterations": 2, "forget loss": -3.0, "replay loss": 0.0}
    loop.training_log(
        {"forget loss": -9.0, "replay loss": 0.0}, totals, 0.1, 4, 1.0, False, skipped
    )
    assert printed == [f" iteration        4 | forget loss: {average:.6E} |"]


def test_known_remarks_of_libraries_are_left_out_and_others_are_not(caplog):
    model = logging.getLogger("megatron.core.models.gpt.gpt_model")
    with warnings.catch_warnings(record=True) as seen, caplog.at_level(logging.WARNING):
        warnings.simplefilter("always")
        console.quiet()
        warnings.warn("torch.distributed is disabled, unavailable or uninitialized", stacklevel=1)
        warnings.warn("news of torch.distributed", stacklevel=1)
        model.warning("GPTModel IS DEPRECATED. GPTModel is only")
        model.warning("news of the model")
        extensions = logging.getLogger("torch.utils.cpp_extension")
        extensions.warning("No CUDA runtime is found, using CUDA_HOME='%s'", "/usr/local/cuda")
    assert [str(warning.message) for warning in seen] == ["news of torch.distributed"]
    assert caplog.messages == ["news of the model"]


@pytest.mark.skipif(not hasattr(os, "O_DIRECT"), reason="needs pipes that keep writes apart")
@pytest.mark.parametrize("file", ["stdout", "stderr"])
def test_a_line_is_one_write_where_python_is_told_to_buffer_nothing(file):
    """So ranks that share an output cannot write into each other's lines."""
    write = f"print('reference:', 1, file=sys.{file}); print('|', end='\\r', file=sys.{file})"
    enable = "from megatron_ext.runtime import console; console.write_whole_lines()"
    code = "\n".join(("import sys", write, enable, write))
    reading, writing = os.pipe2(os.O_DIRECT)
    subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=os.environ | {"PYTHONUNBUFFERED": "1"},
        **{file: writing},
        check=True,
    )
    os.close(writing)
    writes = list(iter(lambda: os.read(reading, 4096), b""))
    os.close(reading)
    # A pipe of this kind gives what was written at once, and nothing else, to one reader's call.
    assert writes[-2:] == [b"reference: 1\n", b"|\r"]
    assert len(writes) > 4, "whole lines without it: the test sees nothing"


def test_times_and_changes_of_the_schedule_are_shown_where_warnings_are(monkeypatch):
    seen = []
    handler = logging.Handler()
    handler.emit = lambda record: seen.append(record.getMessage())
    monkeypatch.setattr(logging.getLogger(), "level", logging.WARNING)
    monkeypatch.setattr(logging.getLogger(), "handlers", [handler])
    timers, schedule = (
        logging.getLogger(f"megatron.core.{name}")
        for name in ("timers", "optimizer_param_scheduler")
    )
    for logger in (timers, schedule):
        monkeypatch.setattr(logger, "level", logging.NOTSET)
    console.quiet()
    timers.info("of a tool")
    console.show_times()
    timers.info("(min, max) time across ranks (ms):")
    schedule.info(" > overriding learning rate value to 0.1")
    schedule.info(" > using checkpoint value 0.1 for learning rate")
    assert seen == [
        "(min, max) time across ranks (ms):",
        " > overriding learning rate value to 0.1",
    ]


def test_a_mistyped_flag_is_answered_in_two_lines(capsys):
    parser = add_arguments(argparse.ArgumentParser(prog="pretrain_unlearn.py"))
    with pytest.raises(SystemExit):
        parser.parse_args(["--forget-weigth", "1"])
    usage, error = capsys.readouterr().err.splitlines()
    assert "--help" in usage
    assert "--forget-weigth" in error


def test_a_mistyped_flag_is_answered_with_the_closest_one(capsys):
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--micro-batch-size", type=int)
    add_arguments(parser)

    def answer(*words):
        with pytest.raises(SystemExit) as leaving:
            parser.parse_args(words)
        assert leaving.value.code == 2
        return capsys.readouterr().err.splitlines()[-1]

    found = answer("--forget-wieght", "0.1", "--micro-batchsize=4")
    assert found.endswith(
        "unrecognized arguments: --forget-wieght 0.1 --micro-batchsize=4; did you mean "
        "--forget-weight, --micro-batch-size?"
    )
    assert answer("--zzz", "1").endswith("unrecognized arguments: --zzz 1")
    assert answer("--forget-weight", "much").endswith("invalid float value: 'much'")


def test_help_names_the_defaults_of_unlearning():
    text = " ".join(add_arguments(argparse.ArgumentParser()).format_help().split())
    text = text[text.index("unlearning (arXiv") :]
    for default in ("bounded", "0.01", "1.0"):
        assert f"Default: {default}." in text
    assert "Default: None" not in text
    assert "Default: False" not in text
