#!/usr/bin/env python
"""Look at what a model makes of text.

    torchrun --nproc-per-node 2 tools/analyze.py perplexity --checkpoint runs/base runs/synth \
        --data real=data/real_text_document synthetic=data/synthetic_text_document \
        --tokenizer-model tokenizer.model --output perplexity.json --tensor-model-parallel-size 2

Per-sample perplexities (figure 4 of arXiv 2406.12397) of any sets under any checkpoints, computed by the
distributed model; also without torchrun, as one process. The architecture is read from each checkpoint.
"""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from argparse import Namespace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
warnings.filterwarnings("ignore", message=".*(Transformer Engine|Apex).*")

from megatron_ext.runtime import compat, cpu  # noqa: E402

cpu.enable()

from tools.common import run_tool  # noqa: E402


def main() -> None:
    """Parse the command line and run a verb."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    verbs = parser.add_subparsers(dest="verb", required=True)
    perplexity = verbs.add_parser("perplexity", help="per-sample perplexity of sets of text")
    perplexity.add_argument("--checkpoint", nargs="+", required=True, help="checkpoint directories")
    perplexity.add_argument(
        "--data", nargs="+", required=True, metavar="NAME=PREFIX", help="tokenised datasets"
    )
    perplexity.add_argument("--tokenizer-type", default="SentencePieceTokenizer")
    perplexity.add_argument("--tokenizer-model", required=True)
    perplexity.add_argument("--samples", type=int, default=2000, help="documents drawn of each set")
    perplexity.add_argument("--seed", type=int, default=1234, help="of the draw")
    perplexity.add_argument("--output", required=True, help="JSON file to write")
    perplexity.add_argument("--micro-batch-size", type=int, default=8)
    perplexity.add_argument("--tensor-model-parallel-size", type=int, default=1)
    perplexity.add_argument("--pipeline-model-parallel-size", type=int, default=1)
    run_perplexity(parser.parse_args())


def run_perplexity(options: Namespace) -> None:
    """Score every set under every checkpoint and write one JSON file."""
    from megatron_ext.analysis.session import open_session
    from megatron_ext.data.atomic import write_atomically
    from megatron_ext.exceptions import ConfigError

    sets = {}
    for item in options.data:
        name, separator, prefix = item.partition("=")
        if not separator:
            raise ConfigError(f"--data: expected NAME=PREFIX, found {item}")
        sets[name] = prefix
    compat.apply()
    report: dict[str, Any] = {"settings": vars(options), "models": {}}
    with open_session(options) as session:
        for directory in options.checkpoint:
            scores = session.perplexities(directory, sets)
            report["models"][directory] = scores
        if session.is_writer:
            text = json.dumps(report, indent=1)
            write_atomically(Path(options.output), text.encode(), overwrite=True)


if __name__ == "__main__":
    run_tool(main)
