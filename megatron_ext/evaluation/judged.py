"""What the benchmarks with a judge have in common on the command line: flags, first checks, results."""

from __future__ import annotations

import json
from argparse import ArgumentParser, Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_ext.data.atomic import check_place, write_atomically
from megatron_ext.evaluation.backends import add_model_arguments
from megatron_ext.evaluation.judge import Judge, judge_from
from megatron_ext.evaluation.records import check_name
from megatron_ext.exceptions import ConfigError


def add_common_arguments(parser: ArgumentParser) -> None:
    """Flags of the model, of its name and of the place of the results."""
    parser.add_argument("--name", required=True, help="name of the model in files and tables")
    parser.add_argument("--output-dir", type=Path, required=True)
    parser.add_argument("--overwrite", action="store_true", help="replace existing answers")
    add_model_arguments(parser, required=False)


def check_common(options: Namespace) -> Judge | None:
    """The judge, if one is named, once it is clear that there is something to do and a place for it.

    Raises:
        ConfigError: neither a model nor a judge is named, or one of the flags cannot be used.
    """
    check_name(options.name)
    judge = judge_from(options)
    if judge is None and options.model is None:
        raise ConfigError(
            "expected --model to answer, --judge-url to judge, or both, found neither"
        )
    if options.is_writer:
        check_place(options.output_dir, flag="--output-dir", is_folder=True)
    return judge


def publish(results: Mapping[str, Any], report: str, file: Path) -> None:
    """Write results as JSON, and print them as text."""
    text = json.dumps(results, indent=1, ensure_ascii=False)
    write_atomically(file, text.encode(), overwrite=True)
    print(f"{report}\n\n{file}")
