"""What --help of a tool says."""

import pytest

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
