#!/usr/bin/env python
r"""Join tokenised data sets into one.

    python tools/merge_data.py --output data/all_text_document data/web_*_text_document.idx

writes data/all_text_document.bin, .idx and .manifest.json, byte for byte what tools/preprocess_data.py writes
of the inputs of all in one run; sources and counts of the manifests are joined. The order is that of the
command line. Tokenizer, --append-eod and the type of the ids must be the same, and the content what the
manifests say. Data sets that are joined stay as they are; files appear complete or not at all.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_ext.data.blend import bare_prefix
from megatron_ext.data.indexed import bin_path
from megatron_ext.data.merge import merge
from tools.common import ToolParser, run_tool


def parse_args() -> argparse.Namespace:
    """Parse the command line."""
    parser = ToolParser(description=__doc__, allow_abbrev=False)
    data: dict[str, Any] = {"type": bare_prefix, "metavar": "PREFIX"}
    parser.add_argument("prefix", **data, nargs="+", help="data sets, as --data-path names them")
    parser.add_argument("--output", **data, required=True, help="the data set that is written")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing output")
    return parser.parse_args()


def main() -> None:
    """Run the tool."""
    args = parse_args()
    paths = [bin_path(prefix) for prefix in args.prefix]
    size = sum(path.stat().st_size for path in paths if path.is_file())
    with tqdm(total=size, unit="B", unit_scale=True, desc="joining", disable=None) as bar:
        merged = merge(args.prefix, args.output, overwrite=args.overwrite, advance=bar.update)
    found = merged.summary
    note = "" if merged.has_manifest else "; no manifest, as those that were joined have none"
    print(
        f"{args.output}: {len(args.prefix)} data sets, {found.documents:,} documents, "
        f"{found.tokens:,} tokens ({found.dtype.name}){note}"
    )


if __name__ == "__main__":
    run_tool(main)
