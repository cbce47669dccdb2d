"""What --help of a tool says."""

import subprocess
import sys

import pytest

from tests.helpers.entry import ROOT
from tools import build_index, plan_run
from tools.common import ToolParser


def test_help_shows_defaults_of_flags_and_of_verbs(capsys):
    parser = ToolParser(description="a \\\n    b")
    parser.add_argument("--rank", type=int, default=3, help="of it")
    verb = parser.add_subparsers().add_parser("go")
    verb.add_argument("--share", type=float, default=0.5)
    verb.add_argument("--told", default=7, help="seven, 7")
    verb.add_argument("--name", help="no default is none")
    verb.add_argument("--fast", action="store_true", help="a switch")
    assert "of it, default 3" in parser.format_help()
    assert "a \\\n    b" in parser.format_help()
    with pytest.raises(SystemExit):
        parser.parse_args(["go", "--help"])
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert lines[-4:] == [
        "--share SHARE default 0.5",
        "--told TOLD seven, 7",
        "--name NAME no default is none",
        "--fast a switch",
    ]


def test_a_mistyped_flag_is_answered_with_the_closest_one(capsys):
    parser = ToolParser(prog="tool")
    parser.add_argument("--rank", type=int)
    verb = parser.add_subparsers().add_parser("go")
    verb.add_argument("--output", type=str)

    def answer(*words):
        with pytest.raises(SystemExit) as leaving:
            parser.parse_args(words)
        assert leaving.value.code == 2
        return capsys.readouterr().err.splitlines()[-1]

    assert answer("--rnak=1", "go").endswith(
        "unrecognized arguments: --rnak=1; did you mean --rank?"
    )
    assert answer("go", "--ouput", "x").endswith(
        "unrecognized arguments: --ouput x; did you mean --output?"
    )
    assert answer("go", "--zzz").endswith("unrecognized arguments: --zzz")


def test_help_of_tools_that_run_models_does_not_wait_for_torch():
    code = """if True:
        import sys
        from tools import analyze, convert_checkpoint, evaluate, generate
        for tool in (analyze, convert_checkpoint, evaluate, generate):
            sys.argv = [tool.__name__, "--help"]
            try:
                tool.main()
            except SystemExit as leaving:
                assert leaving.code == 0
        slow = {"torch", "megatron", "transformers"} & set(sys.modules)
        assert not slow, slow"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("usage: ") == 4


@pytest.mark.parametrize(
    ("parse", "words"),
    [
        (plan_run.parse_options, ["--gpus", "2", "--num-layers", "2"]),
        (build_index.run_flags, ["--num-layers", "2"]),
    ],
)
def test_flags_of_a_run_belong_behind_two_dashes(parse, words, capsys):
    with pytest.raises(SystemExit):
        parse(words)
    error = capsys.readouterr().err.splitlines()[-1]
    assert "unrecognized arguments: --num-layers" in error
    assert error.endswith("; put the flags of the run behind --")


@pytest.mark.parametrize(
    ("flags", "ranks"),
    [
        ([], 1),
        (["--tensor-model-parallel-size", "4", "--pipeline-model-parallel-size", "3"], 12),
        (["--context-parallel-size", "2", "--tensor-model-parallel-size=2"], 4),
        # Experts are spread over ranks that otherwise hold copies; each in as many parts as TP has.
        (["--context-parallel-size", "2", "--expert-model-parallel-size", "2"], 2),
        (["--tensor-model-parallel-size", "2", "--expert-model-parallel-size", "4"], 8),
        (["--expert-model-parallel-size", "3", "--context-parallel-size", "2"], 6),
        (
            ["--tensor-model-parallel-size", "2", "--expert-model-parallel-size", "4"]
            + ["--expert-tensor-parallel-size", "1"],
            4,
        ),
    ],
)
def test_an_index_is_built_for_the_least_ranks_of_a_run(flags, ranks):
    assert build_index.smallest_world(flags) == ranks
