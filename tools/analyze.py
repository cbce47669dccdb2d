#!/usr/bin/env python
r"""Look at text, and at what a model makes of it.

    python tools/analyze.py tokens --data real=data/real_text_document pairs=data/pairs_text_document \
        --tokenizer-model tokenizer.model --output tokens.json
    torchrun --nproc-per-node 2 tools/analyze.py perplexity --checkpoint runs/base runs/synth \
        --data real=data/real_text_document synthetic=data/synthetic_text_document \
        --output perplexity.json --tensor-model-parallel-size 2
    python tools/analyze.py report --tokens tokens.json --perplexity perplexity.json --output report.html \
        --losses unlearn=runs/unlearn/tensorboard --before synth --after unlearn --forgotten synthetic

The figures of arXiv 2406.12397 for data and models of one's own: embeddings (figure 2), structural tokens
(figure 3, no model) and per-sample perplexities (figure 4). Each prints a table and writes a JSON file, and
beside it a picture of the same name; `report` makes one page of those files, loss curves and evaluations.
Models run distributed, also without torchrun as one process; architecture and tokenizer are read from the
first checkpoint, and all are compared with it before one is run. Results are written after each.
"""

from __future__ import annotations

import json
import logging
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from megatron_ext.runtime import console

console.quiet()

from megatron_ext.analysis.samples import describe_dataset, parse_sets  # noqa: E402
from megatron_ext.data.atomic import AtomicFiles, check_place, refuse_existing  # noqa: E402
from megatron_ext.exceptions import ConfigError, flag_name  # noqa: E402
from tools.common import ToolParser, run_tool  # noqa: E402

if TYPE_CHECKING:
    from megatron_ext.analysis.figures import Panel
    from megatron_ext.analysis.measure import Analysis

logger = logging.getLogger(__name__)

_NAMED = "checkpoint directory, of which the latest is taken, or DIR/iter_NNNNNNN"


def main() -> None:
    """Parse the command line and run a verb."""
    parser = ToolParser(description=__doc__)
    verbs = parser.add_subparsers(dest="verb", required=True)
    tokens = verbs.add_parser("tokens", help="structural tokens of sets of text; needs no model")
    _add_data(tokens)
    tokens.add_argument("--tokenizer-type", default="SentencePieceTokenizer")
    tokens.add_argument("--tokenizer-model", required=True)
    tokens.add_argument(
        "--baseline",
        metavar="NAME",
        help="set that the others are compared with (default: the first)",
    )
    tokens.add_argument(
        "--length", type=int, default=4096, help="read this many tokens of each document"
    )
    tokens.add_argument(
        "--bandwidth",
        type=float,
        default=1.0,
        help="bandwidth, in token ids, of the kernel density that finds peaks (default %(default)s); "
        "pictures are drawn with one of 1/250 of the vocabulary, if that is wider",
    )
    tokens.add_argument("--top", type=int, default=20, help="tokens printed for each set")
    perplexity = verbs.add_parser("perplexity", help="per-sample perplexity of sets of text")
    perplexity.add_argument("--checkpoint", nargs="+", required=True, help=f"{_NAMED}; several")
    _add_data(perplexity)
    _add_layout(perplexity)
    embeddings = verbs.add_parser("embeddings", help="whether a model tells sets of text apart")
    embeddings.add_argument("--checkpoint", nargs=1, required=True, help=_NAMED)
    _add_data(embeddings)
    _add_layout(embeddings)
    _add_report(verbs.add_parser("report", help="one HTML page of all of it"))
    options = parser.parse_args()
    _check(options)
    runners = {"tokens": run_tokens, "embeddings": run_embeddings, "perplexity": run_perplexity}
    runners["report"] = run_report
    runners[options.verb](options)


def _add_data(parser: ArgumentParser) -> None:
    """Flags of every verb that reads tokenised text."""
    parser.add_argument(
        "--data", nargs="+", required=True, metavar="NAME=PREFIX", help="tokenised datasets"
    )
    parser.add_argument("--samples", type=int, default=2000, help="documents drawn of each set")
    parser.add_argument("--seed", type=int, default=1234, help="seed of the drawing of documents")
    parser.add_argument("--output", required=True, help="JSON file to write")
    parser.add_argument(
        "--overwrite", action="store_true", help="replace an existing output and its picture"
    )


def _add_layout(parser: ArgumentParser) -> None:
    """Flags of every verb that runs a model."""
    parser.add_argument("--tokenizer-type", help="default: that recorded with the first checkpoint")
    parser.add_argument(
        "--tokenizer-model", help="default: that recorded with the first checkpoint"
    )
    parser.add_argument(
        "--length",
        type=int,
        help="read this many tokens of each document (default: the model's sequence length)",
    )
    parser.add_argument("--micro-batch-size", type=int, default=8)
    parser.add_argument("--tensor-model-parallel-size", type=int, default=1)
    parser.add_argument("--pipeline-model-parallel-size", type=int, default=1)


def _add_report(parser: ArgumentParser) -> None:
    """Flags of the report: files to read, and what models and sets are to each other."""
    parser.add_argument("--output", required=True, help="HTML file to write")
    parser.add_argument(
        "--overwrite", action="store_true", help="replace an existing output and its picture"
    )
    parser.add_argument("--title", default="What unlearning did to this model and its data")
    for verb in ("tokens", "embeddings"):
        parser.add_argument(f"--{verb}", nargs="+", default=[], help=f"JSON files of `{verb}`")
    parser.add_argument("--perplexity", help="JSON file of `perplexity`")
    for flag, what in (
        ("--losses", "TensorBoard directories of runs"),
        ("--evaluation", "JSON files of evaluate.py; a name may have several"),
    ):
        parser.add_argument(flag, nargs="+", default=[], metavar="NAME=PATH", help=what)
    parser.add_argument("--before", metavar="MODEL", help="the model before unlearning")
    parser.add_argument("--after", nargs="+", default=[], metavar="MODEL", help="models after it")
    for flag, what in (
        ("--forgotten", "sets that were to be forgotten"),
        ("--instruction", "sets whose shift by synthetic training was to be taken back"),
    ):
        parser.add_argument(flag, nargs="+", default=[], metavar="SET", help=what)


def _check(options: Namespace) -> None:
    """Refuse numbers that make no sense, and an output that cannot be written, before any work."""
    for name in ("samples", "length", "bandwidth", "top", "micro_batch_size"):
        value = getattr(options, name, None)
        if value is not None and value <= 0:
            raise ConfigError(f"{flag_name(name)}: expected more than 0, found {value}")
    path = Path(options.output)
    if path.is_dir() or path.suffix == ".png":
        kind = "an HTML" if options.verb == "report" else "a JSON"
        found = "a folder" if path.is_dir() else "a picture"
        raise ConfigError(f"--output: expected {kind} file, found {found}, {options.output}")
    check_place(options.output, flag="--output")
    refuse_existing(_outputs(options), overwrite=options.overwrite)


def _outputs(options: Namespace) -> list[Path]:
    """The file of a verb, and the picture beside it."""
    path = Path(options.output)
    if options.verb != "report":
        return [path, path.with_suffix(".png")]
    return [path, path.with_name(f"{path.stem}-losses.png")] if options.losses else [path]


def run_tokens(options: Namespace) -> None:
    """Compare the tokens of sets of text."""
    from megatron_ext.analysis.token_report import measure_tokens, token_panels, token_table

    report = measure_tokens(options, parse_sets(options.data))
    _write(options, report, token_panels(report), columns=2)
    print(token_table(report, top=options.top))
    print(_named(options))


def run_embeddings(options: Namespace) -> None:
    """Embed every set under a checkpoint, and measure how far the sets lie apart."""
    sets = parse_sets(options.data)
    if len(sets) < 2:
        raise ConfigError(f"--data: expected at least two sets to compare, found {len(sets)}")
    from megatron_ext.analysis.embedding_report import (
        embedding_panels,
        embedding_table,
        measure_embeddings,
    )

    with redirect_stdout(sys.stderr), _analysis(options) as analysis:
        analysis.check_models()
        model, found = analysis.embeddings(options.checkpoint[0], sets)
        if not analysis.is_writer:
            return
    report = {"verb": "embeddings", "settings": vars(options), "model": model, "sets": {}}
    report["sets"] = {name: describe_dataset(prefix) for name, prefix in sets.items()}
    report |= measure_embeddings(found, seed=options.seed)
    _write(options, report, embedding_panels(report))
    print(embedding_table(report))
    print(_named(options))


def run_perplexity(options: Namespace) -> None:
    """Score every set under every checkpoint, and measure how it shifts from the first one.

    What is known is written after each checkpoint, so that a later one that fails does not lose it.
    """
    from megatron_ext.analysis.perplexity_report import (
        add_shifts,
        perplexity_panels,
        perplexity_table,
    )

    sets = parse_sets(options.data)
    report: dict[str, Any] = {"verb": "perplexity", "settings": vars(options)}
    report |= {"data": {}, "models": {}}
    with redirect_stdout(sys.stderr), _analysis(options) as analysis:
        analysis.check_models()
        if analysis.is_writer:
            report["data"] = {name: describe_dataset(prefix) for name, prefix in sets.items()}
        written = ""
        try:
            for number, directory in enumerate(options.checkpoint, start=1):
                report["models"][directory] = analysis.perplexities(directory, sets)
                if analysis.is_writer:
                    add_shifts(report, seed=options.seed)
                    _write(options, report, perplexity_panels(report), overwrite=bool(written))
                    written = f"{options.output} has {number} of {len(options.checkpoint)} models"
                    logger.info(written)
        except KeyboardInterrupt:
            raise KeyboardInterrupt(written) from None
        if not analysis.is_writer:
            return
    print(perplexity_table(report))
    print(_named(options))


def run_report(options: Namespace) -> None:
    """Write the page, and a picture of the loss curves beside it."""
    from megatron_ext.analysis.figures import render
    from megatron_ext.analysis.report import curves, write_page
    from megatron_ext.analysis.report_inputs import read_inputs

    inputs = read_inputs(options)
    contents = [write_page(inputs, title=options.title).encode()]
    if panels := curves(inputs):
        contents.append(render(panels))
    _publish(options, contents)
    print(_named(options))


def _named(options: Namespace) -> str:
    """The files of a verb, for its last line."""
    return ", ".join(map(str, _outputs(options)))


@contextmanager
def _analysis(options: Namespace) -> Iterator[Analysis]:
    """Megatron, set up for the architecture of the first checkpoint; it prints all of its arguments."""
    from megatron_ext.runtime import collector

    with collector.paused():
        from megatron_ext.runtime import compat, cpu

        cpu.enable()
        from megatron_ext.analysis.measure import Analysis
        from megatron_ext.checkpoint.named import open_named
        from megatron_ext.checkpoint.own_tokenizer import choose_tokenizer
        from megatron_ext.session import open_session

    compat.apply()
    first = open_named(options.checkpoint[0], flag="--checkpoint")
    options.tokenizer_type, options.tokenizer_model = choose_tokenizer(options, first)
    with open_session(options, first, length=options.length) as session:
        yield Analysis(session, options)


def _write(
    options: Namespace,
    report: Mapping[str, Any],
    panels: Sequence[Panel],
    *,
    columns: int = 3,
    overwrite: bool = False,
) -> None:
    """Write a JSON file and the picture of it, also over one of this run's own."""
    from megatron_ext.analysis.figures import render

    text = json.dumps(report, indent=1, ensure_ascii=False, allow_nan=False)
    contents = (text.encode(), render(panels, columns=columns))
    _publish(options, contents, overwrite=overwrite)


def _publish(options: Namespace, contents: Sequence[bytes], *, overwrite: bool = False) -> None:
    """Write a verb's files, all or none; the first is the last to appear."""
    paths = _outputs(options)
    with AtomicFiles(paths[::-1], overwrite=overwrite or options.overwrite) as files:
        for path, content in zip(paths, contents, strict=True):
            files[path].write(content)
        files.commit()


if __name__ == "__main__":
    run_tool(main)
