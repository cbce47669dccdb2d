"""FollowBench from the command line: answers, verdicts, scores."""

from __future__ import annotations

import logging
from argparse import ArgumentParser, Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_ext.data.chat import Message
from megatron_ext.evaluation import followbench as bench
from megatron_ext.evaluation import paper
from megatron_ext.evaluation.answers import (
    check_reused,
    common_settings,
    digest,
    model_settings,
    write_answers,
)
from megatron_ext.evaluation.backends import (
    add_sampling_arguments,
    open_generator,
    sampling_from,
)
from megatron_ext.evaluation.completion import complete_all
from megatron_ext.evaluation.errors import aligned, with_error
from megatron_ext.evaluation.followbench_data import KINDS, LEVELS, Checkout, Question
from megatron_ext.evaluation.journal import Journal, kept_from_before
from megatron_ext.evaluation.judge import Judge, Said, add_judge_arguments, ask_all
from megatron_ext.evaluation.judged import (
    add_common_arguments,
    check_common,
    cut_note,
    judge_settings,
    log_reused,
    publish,
    stored,
    take_place,
)
from megatron_ext.evaluation.records import Record, open_journal, read_records, write_records

logger = logging.getLogger(__name__)

_COLUMNS = ("SSR", "HSR", "CSL")


def add_arguments(parser: ArgumentParser) -> None:
    """Flags of the verb."""
    parser.add_argument(
        "--followbench",
        type=Path,
        required=True,
        help="a checkout of the project: its questions, judge prompts and rules are used",
    )
    parser.add_argument("--language", choices=["en", "zh"], default="en")
    parser.add_argument("--constraint-types", nargs="+", choices=KINDS, default=list(KINDS))
    add_common_arguments(parser)
    add_sampling_arguments(parser, max_new_tokens=2048)
    add_judge_arguments(parser)


def run(options: Namespace) -> None:
    """Answer if a model is named, judge if a judge is named.

    Raises:
        ConfigError: neither is named; or there are answers that were made with other settings.
        DataError: a file is missing or of another form.
    """
    judge = check_common(options)
    checkout = Checkout(options.followbench, language=options.language)
    questions = {kind: checkout.questions(kind) for kind in options.constraint_types}
    if options.model is not None:
        _answer(options, questions)
    if judge is not None and options.is_writer:
        _judge(options, judge, checkout, questions)


def _answer(options: Namespace, questions: Mapping[str, list[Question]]) -> None:
    """Write the answers of this run that are not there."""
    files = {kind: bench.answer_file(options.output_dir, options.name, kind) for kind in questions}
    wanted = [kind for kind in questions if options.overwrite or not files[kind].exists()]
    sampling = sampling_from(options)
    of_kind = {
        kind: vars(sampling) | {"followbench": digest([q.instruction for q in questions[kind]])}
        for kind in questions
    }
    reused = [kind for kind in questions if kind not in wanted]
    for kind in reused:
        check_reused(files[kind], of_kind[kind])
    place = options.output_dir / f"followbench-{options.name}"
    with kept_from_before(place), open_generator(options) as (generator, codec):
        of_model = model_settings(generator, codec)
        for kind in reused:
            check_reused(files[kind], of_kind[kind] | of_model)
            if generator.is_writer:
                logger.info("%s is there and used; --overwrite answers again", files[kind])
        if not wanted:
            return
        asked = [question for kind in wanted for question in questions[kind]]
        settings = of_model | {kind: of_kind[kind] for kind in wanted}
        with open_journal(generator, place, settings) as journal:
            requests = bench.requests(asked, codec, sampling)
            done = complete_all(generator, codec, requests, journal=journal, title="answers")
            if journal is None:
                return
            for kind in wanted:
                lines = [bench.record(q.instruction, done[q.key].text) for q in questions[kind]]
                write_answers(files[kind], lines, of_kind[kind] | of_model, options)
            journal.remove()


def _judge(
    options: Namespace,
    judge: Judge,
    checkout: Checkout,
    questions: Mapping[str, list[Question]],
) -> None:
    """Ask for the verdicts that are not there, and score."""
    output, name = options.output_dir, options.name
    files = {kind: bench.answer_file(output, name, kind) for kind in questions}
    answers = {kind: bench.read_answers(files[kind], questions[kind]) for kind in questions}
    made_with = common_settings(list(files.values()), questions="followbench")
    prompts = {
        kind: bench.judge_prompts(checkout, questions[kind], answers[kind]) for kind in questions
    }
    said = _said(options, judge, questions, prompts)
    texts = {key: one.verdict for key, one in said.items()}
    kinds = {
        kind: bench.score(bench.verdicts(checkout, questions[kind], answers[kind], texts))
        for kind in questions
    }
    results: dict[str, Any] = {
        "benchmark": "followbench",
        "model": name,
        "language": options.language,
        "answers": made_with,
        "judge": judge_settings(judge, said.values()),
        "constraint_types": kinds,
        "summary": bench.summarise(kinds),
    }
    publish(results, report(results), output / f"followbench-{name}.json")


def _said(
    options: Namespace,
    judge: Judge,
    questions: Mapping[str, Sequence[Question]],
    prompts: Mapping[str, Mapping[str, list[Message]]],
) -> dict[str, Said]:
    """What the judge says by question; asked where prompt or judge is another, or nothing was understood."""
    known = _known(options, judge, questions, prompts)
    flat = {key: messages for kind in prompts.values() for key, messages in kind.items()}
    todo = {key: messages for key, messages in flat.items() if key not in known}
    settings = {"judge": judge.model, "url": judge.url, "prompts": flat}
    with Journal(
        options.output_dir / f"followbench-{options.name}-judge", settings=settings
    ) as kept:
        said = known | ask_all(judge, todo, journal=kept)
        for kind in KINDS:  # of one judge each, also if some are not judged now
            file = bench.verdict_file(options.output_dir, options.name, kind)
            found = read_records(file)[0].get("judge") if file.exists() else None
            take_place(file, judge.model, found=found, output_dir=options.output_dir)
            asked = prompts.get(kind, {})  # of none where rules check all examples
            if lines := [_verdict(judge, m, said[key]) for key, m in asked.items()]:
                write_records(file, lines, overwrite=True)
        kept.remove()
    return said


def _known(
    options: Namespace,
    judge: Judge,
    questions: Mapping[str, Sequence[Question]],
    prompts: Mapping[str, Mapping[str, list[Message]]],
) -> dict[str, Said]:
    """Verdicts of earlier runs: of this judge, on the same prompts, and such as can be parsed."""
    known: dict[str, Said] = {}
    for kind, asked in prompts.items():
        place = bench.verdict_file(options.output_dir, options.name, kind)
        file = stored(place, judge.model, output_dir=options.output_dir)
        if not file.exists():
            continue
        texts = {
            line["prompt_new"]: Said(line["choices"][0]["message"]["content"], line.get("cut_at"))
            for line in read_records(file)
            if line.get("judge") == judge.model
        }
        found = {
            q.key: said
            for q in questions[kind]
            if q.key in asked and (said := texts.get(asked[q.key][0]["content"]))
            if bench.parse_verdict(said.verdict, level=q.level) is not None
        }
        log_reused(len(found), len(asked), file)
        known |= found
    return known


def _verdict(judge: Judge, messages: Sequence[Message], said: Said) -> Record:
    """A line as the project writes it, with the judge and, if it was cut, the limit of tokens."""
    cut = {} if said.cut_at is None else {"cut_at": said.cut_at}
    return bench.record(messages[0]["content"], said.text) | {"judge": judge.model} | cut


def report(results: Mapping[str, Any]) -> str:
    """The scores as text: levels of each constraint type, then the table beside the paper's."""
    rows = [row for part in results["constraint_types"].items() for row in _rows(*part)]
    means = aligned(["mean", *(mean for _, mean, _ in rows)])
    head = f"{'constraints':<12}{'':<5}" + "".join(f"{level:>7}" for level in range(1, LEVELS + 1))
    lines = [f"{head}  {means[0]}   bounds"]
    for (levels, _, bounds), mean in zip(rows, means[1:], strict=True):
        lines.append(f"{levels}  {mean}   {bounds}".rstrip())
    lines.append("±: standard error over examples, whose levels are one observation each")
    summary = results["summary"]
    unparsable = f"unparsable verdicts: {summary['unparsable']} of {summary['verdicts']}"
    if summary["unparsable"]:
        ends = [summary[rate]["bounds"] for rate in ("ssr", "hsr")] + [summary["csl_bounds"]]
        shown = (
            f"{name} {low:.2f} to {high:.2f}"
            for name, (low, high) in zip(_COLUMNS, ends, strict=True)
        )
        unparsable += f"; the means lie within {', '.join(shown)}"
    lines += [unparsable, *cut_note(results["judge"]), ""]
    ours = {results["model"]: (summary["ssr"]["mean"], summary["hsr"]["mean"], summary["csl"])}
    theirs = {model: (ssr, hsr, None) for model, (ssr, hsr, _) in paper.CHAT.items()}
    errors = (summary["ssr"]["error"], summary["hsr"]["error"], summary["csl_error"])
    lines.append(paper.table(_COLUMNS, ours, theirs, errors={results["model"]: errors}))
    return "\n".join(lines)


def _rows(kind: str, scores: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Of a constraint type the name and the levels, the mean, and the bounds, of each score."""
    rows = []
    for rate in ("hsr", "ssr"):
        levels = (with_error(value, None, digits=1) for value in scores[rate]["levels"])
        low, high = scores[rate]["bounds"]
        rows.append(
            (
                f"{kind:<12}{rate.upper():<5}" + "".join(f"{value:>7}" for value in levels),
                with_error(scores[rate]["mean"], scores[rate]["error"], digits=1),
                f"{low:.1f} to {high:.1f}" if scores["unparsable"] else "",
            )
        )
    low, high = scores["csl_bounds"]
    bounds = f"{low:.2f} to {high:.2f}" if scores["unparsable"] else ""
    mean = with_error(scores["csl"], scores["csl_error"])
    return [*rows, (f"{'':<12}{'CSL':<5}{'':<{7 * LEVELS}}", mean, bounds)]
