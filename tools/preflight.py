#!/usr/bin/env python
r"""Check the nodes of a run before it starts: one rank a GPU, on all nodes, as the run will have them.

    torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HEAD:PORT tools/preflight.py \
        --shared /ckpt --checkpoint-bytes 30e9 --data /data/web_text_document \
        --tokenizer-type SentencePieceTokenizer --tokenizer-model /data/tok.model

Compares versions, this checkout, GPUs and clocks of all nodes; checks all-reduce and measures it and the
links between neighbours, over NCCL (gloo without GPUs); writes to the shared folder and reads it on every
node; looks at data sets, tokenizer, checkpoints and files from every node. Rank 0 prints a table of pass,
warn and FAIL; the exit code is 1 if anything failed. Ranks wait for each other --timeout seconds at most;
those that do not come are named.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_ext import launched
from megatron_ext.data.atomic import check_place, refuse_existing, replace_file
from megatron_ext.data.tokenizers import TOKENIZER_TYPES, TokenizerSpec
from megatron_ext.exceptions import ConfigError
from megatron_ext.preflight.ranks import connect
from megatron_ext.preflight.run import Options, run
from megatron_ext.preflight.verdict import FAIL, Row, format_table
from tools.common import ToolParser, run_tool


def parse_args() -> argparse.Namespace:
    """Parse the command line."""
    parser = ToolParser(description=__doc__, allow_abbrev=False)
    add = parser.add_argument
    add(
        "--shared",
        type=Path,
        metavar="DIR",
        help="folder for checkpoints, which all nodes must see; created if its parent folder exists",
    )
    add(
        "--probe-mib",
        type=int,
        default=64,
        help="size in MiB of the test file written to --shared, default 64",
    )
    add(
        "--checkpoint-bytes",
        type=float,
        default=0,
        metavar="N",
        help="bytes that must be free in --shared",
    )
    add(
        "--data",
        nargs="+",
        default=[],
        metavar="PREFIX",
        help="data sets, as --data-path names them",
    )
    add(
        "--inputs",
        nargs="+",
        default=[],
        metavar="PATH",
        help="folders of checkpoints, and files, that the run reads",
    )
    add("--tokenizer-type", choices=TOKENIZER_TYPES)
    add(
        "--tokenizer-model",
        help="tokenizer to check the data sets against; without it only their manifests are checked",
    )
    add(
        "--message-mib",
        nargs="+",
        type=float,
        metavar="N",
        help="sizes in MiB of the measured all-reduces",
    )
    add(
        "--min-bus-bandwidth",
        type=float,
        metavar="GB/s",
        help="fail if the bus bandwidth of the largest all-reduce is lower",
    )
    add(
        "--timeout",
        type=float,
        default=120,
        metavar="SECONDS",
        help="longest time that ranks wait for each other, default 120",
    )
    add("--json", type=Path, metavar="FILE", help="also write the table to this JSON file")
    add(
        "--table",
        type=Path,
        metavar="FILE",
        help="also write the table to this text file, in the place of an older one",
    )
    args = parser.parse_args()
    if (args.tokenizer_type is None) != (args.tokenizer_model is None):
        raise ConfigError(
            "--tokenizer-type, --tokenizer-model: expected both or neither, found one"
        )
    for flag in ("timeout", "probe_mib", "message_mib", "min_bus_bandwidth"):
        given = getattr(args, flag)
        for value in given if isinstance(given, list) else [given]:
            if value is not None and not 0 < value < math.inf:
                name = flag.replace("_", "-")
                raise ConfigError(f"--{name}: expected more than 0, found {value}")
    if not 0 <= args.checkpoint_bytes < math.inf:
        raise ConfigError(f"--checkpoint-bytes: expected 0 or more, found {args.checkpoint_bytes}")
    return args


def options_of(args: argparse.Namespace) -> Options:
    """What the command line asks for, in bytes."""
    spec = None
    if args.tokenizer_model is not None:
        spec = TokenizerSpec(
            tokenizer_type=args.tokenizer_type, tokenizer_model=args.tokenizer_model
        )
    sizes = sorted(int(size * 2**20) for size in args.message_mib or ())
    least = args.min_bus_bandwidth
    return Options(
        shared=args.shared,
        probe_bytes=args.probe_mib << 20,
        checkpoint_bytes=int(args.checkpoint_bytes),
        data=args.data,
        inputs=args.inputs,
        tokenizer=spec,
        message_bytes=sizes or None,
        least_bandwidth=None if least is None else least * 1e9,
    )


def write_json(path: Path, rows: Sequence[Row]) -> None:
    """The rows, and whether none of them failed."""
    passed = all(row.status != FAIL for row in rows)
    report = {"passed": passed, "rows": [dataclasses.asdict(row) for row in rows]}
    replace_file(path, f"{json.dumps(report, indent=2)}\n".encode())


def write_table(path: Path, table: str) -> None:
    """The table in a file; a folder that cannot be written is what the table itself has found."""
    try:
        replace_file(path, f"{table}\n".encode())
    except OSError as error:
        print(f"preflight.py: --table {path}: {error.strerror}", file=sys.stderr, flush=True)


def main() -> None:
    """Run, print, and leave with 1 if anything failed."""
    args = parse_args()
    options = options_of(args)
    if launched.rank() == "0":
        for flag, path in (("--json", args.json), ("--table", args.table)):
            if path is not None:
                check_place(path, flag=flag)
                refuse_existing([path], overwrite=True)
    ranks = connect(os.environ, timeout=args.timeout)
    rows = run(ranks, options)
    failed = any(row.status == FAIL for row in rows)
    if ranks.rank == 0:
        table = format_table(rows)
        print(table, flush=True)
        if args.table is not None:
            write_table(args.table, table)
        if args.json is not None:
            write_json(args.json, rows)
    elif rows:
        print(
            f"preflight.py: error (rank {ranks.rank}): {rows[-1].detail}",
            file=sys.stderr,
            flush=True,
        )
    if failed:
        # Not by sys.exit: a collective that is stuck would keep the process.
        sys.stderr.flush()
        os._exit(1)


if __name__ == "__main__":
    run_tool(main)
