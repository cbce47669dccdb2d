"""What the benchmarks with a judge have in common on the command line: flags, first checks, results.

A file of one judge's results has the same name whichever judge it is. The latest has that name; what another
one left there is kept below `OTHERS`, in a folder of its own that is laid out like the output's, and comes
back when that judge is asked again.
"""

from __future__ import annotations

import json
import logging
from argparse import ArgumentParser, Namespace
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

from megatron_ext.data.atomic import check_place, write_atomically
from megatron_ext.evaluation.backends import add_model_arguments
from megatron_ext.evaluation.judge import Judge, Said, judge_from
from megatron_ext.evaluation.records import check_name
from megatron_ext.exceptions import ConfigError

logger = logging.getLogger(__name__)

OTHERS = "other_judges"
# Of files that name no judge, as earlier versions wrote them.
_UNKNOWN = "unknown"


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


def stored(file: Path, judge: str, *, output_dir: Path) -> Path:
    """Where the results of a judge are: apart, if another's took their place."""
    apart = _apart(file, judge, output_dir)
    return apart if apart.exists() else file


def take_place(file: Path, judge: str, *, found: str | None, output_dir: Path) -> None:
    """Put a judge's earlier results, if there are any, in the place of another's, which are kept apart.

    Args:
        file: in `output_dir`; it may not be there.
        judge: the one to be asked.
        found: the one whose results the file has.
        output_dir: where everything is.
    """
    if file.exists() and found != judge:
        apart = _apart(file, found or _UNKNOWN, output_dir)
        apart.parent.mkdir(parents=True, exist_ok=True)
        file.replace(apart)
        logger.info("%s was of judge %s, and is now %s", file, found or _UNKNOWN, apart)
    earlier = _apart(file, judge, output_dir)
    if earlier.exists():
        earlier.replace(file)


def _apart(file: Path, judge: str, output_dir: Path) -> Path:
    name = quote(judge, safe="") if judge.strip(".") else "%2E" * len(judge)
    return output_dir / OTHERS / name / file.relative_to(output_dir)


def judge_settings(judge: Judge, said: Collection[Said]) -> dict[str, Any]:
    """What the results say of the judge and of the verdicts that its limit of tokens cut."""
    cut = sum(one.cut_at is not None for one in said)
    return {"url": judge.url, "model": judge.model, "max_tokens": judge.max_tokens, "cut": cut}


def cut_note(judge: Mapping[str, Any]) -> list[str]:
    """Of `judge_settings` a line for people, if verdicts were cut."""
    if not judge["cut"]:
        return []
    return [
        f"cut by --judge-max-tokens {judge['max_tokens']}: {judge['cut']} of the unparsable verdicts; with a "
        "higher one the same command asks for them again"
    ]


def log_reused(count: int, total: int, file: Path, note: str = "") -> None:
    """Say how many verdicts are those of an earlier run."""
    if count:
        logger.info("%d of %d verdicts are taken from %s%s", count, total, file, note)


def publish(results: Mapping[str, Any], report: str, file: Path) -> None:
    """Write results as JSON in the place of those of any judge, and print them as text."""
    take_place(file, results["judge"]["model"], found=_judge_of(file), output_dir=file.parent)
    text = json.dumps(results, indent=1, ensure_ascii=False)
    write_atomically(file, text.encode(), overwrite=True)
    print(f"{report}\n\n{file}")


def _judge_of(file: Path) -> str | None:
    try:
        return str(json.loads(file.read_bytes())["judge"]["model"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
