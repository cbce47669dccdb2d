#!/usr/bin/env python
"""Write docs/refused.md: every flag and combination of flags that is refused, from the code's tables."""

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from megatron_ext.runtime import console  # noqa: E402

console.quiet()

from megatron_ext.data.atomic import write_atomically  # noqa: E402
from megatron_ext.refusals import render  # noqa: E402
from megatron_ext.runtime import cpu  # noqa: E402
from tools.common import run_tool  # noqa: E402


def main() -> None:
    """Write the page."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    cpu.enable()
    page = ROOT / "docs" / "refused.md"
    page.parent.mkdir(exist_ok=True)
    write_atomically(page, render().encode(), overwrite=True)
    print(page)


if __name__ == "__main__":
    run_tool(main)
