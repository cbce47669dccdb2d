#!/usr/bin/env python
r"""Let a model continue prompts, or answer conversations.

    torchrun --nproc-per-node 2 tools/generate.py --model ckpt/unlearn --input prompts.jsonl \
        --output completions.jsonl --tensor-model-parallel-size 2
    python tools/generate.py --model exported --backend huggingface --input prompts.jsonl ...

A line of the input is {"prompt": text} or {"messages": [{"role", "content"}, ...]}; messages go through the
chat template that is stored with the model, or else, with a warning, through the built-in one. The output has
the same lines with "completion", "finish" and "tokens". What is finished is kept beside the output, and the
same command goes on from there.
"""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from tools.common import ToolParser, run_tool


def main() -> None:
    """Parse the command line, generate and write."""
    from megatron_ext import launched
    from megatron_ext.data.atomic import check_place, refuse_existing
    from megatron_ext.evaluation.backends import (
        add_model_arguments,
        add_sampling_arguments,
        open_generator,
        sampling_from,
    )
    from megatron_ext.evaluation.completion import complete_all
    from megatron_ext.evaluation.journal import kept_from_before
    from megatron_ext.evaluation.records import (
        open_journal,
        read_prompts,
        requests_of,
        write_records,
    )

    parser = ToolParser(description=__doc__)
    parser.add_argument("--input", type=Path, required=True, help="JSON lines of prompts")
    parser.add_argument("--output", type=Path, required=True, help="JSON lines to write")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing output")
    add_model_arguments(parser)
    add_sampling_arguments(parser, max_new_tokens=256)
    options = parser.parse_args()
    sampling = sampling_from(options)
    if launched.rank() == "0":
        check_place(options.output, flag="--output")
    records = read_prompts(options.input)
    refuse_existing([options.output], overwrite=options.overwrite)
    with kept_from_before(options.output), open_generator(options) as (generator, codec):
        requests = requests_of(records, codec, sampling)
        settings: dict[str, Any] = {
            "model": generator.identity,
            "requests": [[list(r.tokens), asdict(r.sampling), sorted(r.stop)] for r in requests],
        }
        with open_journal(generator, options.output, settings) as journal:
            done = complete_all(generator, codec, requests, journal=journal, title="prompts")
            if journal is not None:
                lines = [
                    record | _output(asdict(done[request.key]))
                    for record, request in zip(records, requests, strict=True)
                ]
                write_records(options.output, lines, overwrite=options.overwrite)
                journal.remove()
                print(f"{options.output}: {len(lines)} completions")


def _output(completion: dict[str, Any]) -> dict[str, Any]:
    return {"completion": completion.pop("text"), **completion}


if __name__ == "__main__":
    run_tool(main)
