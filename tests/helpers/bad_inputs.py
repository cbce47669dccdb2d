"""Runs the entry point with many command lines, each in a fork of one process that has imported it all.

    python -m tests.helpers.bad_inputs < cases.json > results.json

`cases.json` holds lists of arguments; a result is the exit code and the output. A start costs 4 s of
imports, a fork of a started process next to nothing; the fork then runs `pretrain_unlearn.py` as
`__main__`, like a user's command.
"""

import json
import os
import runpy
import sys
import tempfile
import traceback
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def run_forked(arguments: list[str]) -> tuple[int, str]:
    """Exit code and output of one command line."""
    with tempfile.TemporaryFile() as output:
        child = os.fork()
        if child == 0:
            os.dup2(output.fileno(), 1)
            os.dup2(output.fileno(), 2)
            os._exit(run_here(arguments))
        _, status = os.waitpid(child, 0)
        output.seek(0)
        return os.waitstatus_to_exitcode(status), output.read().decode()


def run_here(arguments: list[str]) -> int:
    """Run the entry point in this process; its exit code."""
    sys.argv = [str(ROOT / "pretrain_unlearn.py"), *arguments]
    code = 0
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as leaving:
        code = leaving.code if isinstance(leaving.code, int) else int(leaving.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    return code


def main() -> None:
    cases = json.load(sys.stdin)
    sys.path.insert(0, str(ROOT))
    from megatron_ext.runtime import cpu

    cpu.enable()
    # Only so that they are in memory; megatron.training brings what the entry point takes from Megatron.
    import megatron.training  # noqa: F401

    import megatron_ext.arguments
    import megatron_ext.data.providers
    import megatron_ext.reference
    import megatron_ext.training  # noqa: F401

    json.dump([run_forked(arguments) for arguments in cases], sys.stdout)


if __name__ == "__main__":
    main()
