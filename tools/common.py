"""What all tools share: how they log, and how they end."""

import argparse
import logging
import os
import signal
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any, NoReturn

from megatron_ext import launched
from megatron_ext.exceptions import MegatronExtError
from megatron_ext.runtime import console

# For the parsers of tools that take the flags of a run as well.
BEHIND = "put the flags of the run behind --"


# Flags of the command line that was read last, each with a value of it.
_given: list[tuple[str, str]] = []


class ToolParser(argparse.ArgumentParser):
    """Shows the tool's docstring as it is written, and the default of each flag; so do those of its verbs.

    Args:
        hint: What to do about arguments that the tool does not know.
        **settings: Those of `ArgumentParser`.
    """

    def __init__(self, *, hint: str = "", **settings: Any) -> None:
        super().__init__(**{"formatter_class": _HelpFormatter} | settings)
        self.hint = hint

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:  # type: ignore[override]
        """As `ArgumentParser`, and keeps for `run_tool` which flag gave what; a verb's parser comes first."""
        _given.clear()
        parsed, rest = super().parse_known_args(args, namespace)
        for action in self._actions:
            value = getattr(parsed, action.dest, None) if action.option_strings else None
            values = value if isinstance(value, list) else [value]
            _given.extend(
                (action.option_strings[0], str(each))
                for each in values
                if isinstance(each, str | os.PathLike)
            )
        return parsed, rest

    def error(self, message: str) -> NoReturn:
        """Ends with code 2, the usage and the message, with the closest of the tool's flags or its verbs'."""
        message = console.with_suggestion(message, _flags(self))
        if self.hint and message.startswith("unrecognized arguments"):
            message = f"{message}; {self.hint}"
        super().error(message)


def _flags(parser: argparse.ArgumentParser) -> list[str]:
    """Those of a parser and of its verbs, which leave words that they do not know to it."""
    flags = list(parser._option_string_actions)
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            flags += [flag for verb in action.choices.values() for flag in _flags(verb)]
    return flags


class _HelpFormatter(argparse.RawDescriptionHelpFormatter):
    def _format_action(self, action: argparse.Action) -> str:
        default, text = action.default, action.help or ""
        takes_value = bool(action.option_strings) and action.nargs not in (0, "?")
        is_told = "default" in text or str(default) in text.split()
        if takes_value and isinstance(default, str | int | float) and not is_told:
            action.help = f"{text}, default {default}".removeprefix(", ")
        return super()._format_action(action)


def whole_number(text: str) -> int:
    """A flag's value that may be written as 1e9 as well; a large one is hard to read with all its zeros."""
    try:
        return int(text)
    except ValueError:
        pass
    try:
        if (value := float(text)).is_integer():
            return int(value)
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"expected a whole number, found {text!r}")


def usable_cores() -> int:
    """A job's part of its node, not all of it, where the system tells them apart (macOS does not)."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def run_tool(main: Callable[[], None]) -> NoReturn:
    """Runs a tool: log lines to standard error, a user's error as one line and exit code 2.

    What the system says of a path is preceded by the flag that gave the path, or the folder above it.

    What is interrupted ends with code 130, and a line of rank 0: what the interrupt says of the work that is
    kept, or that nothing is.
    """
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    logging.getLogger("megatron").setLevel(logging.WARNING)
    console.quiet()
    console.write_whole_lines()
    signal.signal(signal.SIGTERM, _interrupt)
    name = sys.argv[0].rpartition("/")[2]
    try:
        main()
    except (MegatronExtError, OSError) as error:
        message = " ".join(f"{_origin(error)}{error}".split())
        sys.exit(_fail(f"{name}: error: {message}", 2))
    except KeyboardInterrupt as stop:
        if launched.rank() != "0":
            sys.exit(130)
        # Raised by the interpreter it says nothing; a tool that has written something says what.
        kept = f"; {stop}" if str(stop) else ", nothing was written"
        sys.exit(_fail(f"{name}: interrupted{kept}", 130))
    sys.exit(0)


def _origin(error: Exception) -> str:
    """The flags that a path comes from of which the system says something, and their value."""
    if not isinstance(error, OSError) or not isinstance(error.filename, str | os.PathLike):
        return ""
    path = os.path.abspath(error.filename)
    found: dict[str, list[str]] = {}
    for flag, value in _given:
        # Of sets with names, NAME=PREFIX; a data set is files of its prefix, PREFIX.idx for one.
        for place in {value, value.partition("=")[2]} - {""}:
            start = os.path.abspath(place)
            if path == start or path.startswith((os.path.join(start, ""), f"{start}.")):
                found.setdefault(place, []).append(flag)
    if not found:
        return ""
    nearest = max(found, key=lambda place: len(os.path.abspath(place)))
    return f"{' or '.join(dict.fromkeys(found[nearest]))} {nearest}: "


def _fail(message: str, code: int) -> int:
    print(message, file=sys.stderr)
    return code


def _interrupt(signum: int, frame: FrameType | None) -> None:
    """Ends like Ctrl-C, so that what was begun is cleaned up."""
    raise KeyboardInterrupt
