"""MT-Bench from the command line: answers, verdicts, scores."""

from __future__ import annotations

import hashlib
import logging
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_ext.data.chat import Message
from megatron_ext.evaluation import mtbench as bench
from megatron_ext.evaluation import paper
from megatron_ext.evaluation.answers import (
    Settings,
    check_reused,
    common_settings,
    digest,
    model_settings,
    write_answers,
)
from megatron_ext.evaluation.backends import open_generator
from megatron_ext.evaluation.completion import Codec, Generator, complete_all
from megatron_ext.evaluation.errors import aligned, with_error
from megatron_ext.evaluation.journal import Journal, kept_from_before
from megatron_ext.evaluation.judge import Judge, Said, add_judge_arguments, ask_all
from megatron_ext.evaluation.judged import (
    add_common_arguments,
    check_common,
    cut_note,
    judge_settings,
    log_reused,
    publish,
)
from megatron_ext.evaluation.records import Record, open_journal, read_records, write_records
from megatron_ext.evaluation.sampling import Sampling
from megatron_ext.exceptions import ConfigError

logger = logging.getLogger(__name__)


def add_arguments(parser: ArgumentParser) -> None:
    """Flags of the verb."""
    parser.add_argument("--questions", type=Path, required=True, help="question.jsonl")
    parser.add_argument("--judge-prompts", type=Path, help="judge_prompts.jsonl")
    parser.add_argument(
        "--reference-answers", type=Path, help="reference_answer/gpt-4.jsonl, for maths and code"
    )
    add_common_arguments(parser)
    group = parser.add_argument_group("generation")
    group.add_argument("--max-new-tokens", type=int, default=1024)
    group.add_argument("--top-p", type=float, default=1.0)
    group.add_argument("--seed", type=int, default=0)
    add_judge_arguments(parser)


def run(options: Namespace) -> None:
    """Answer if a model is named, judge if a judge is named.

    Raises:
        ConfigError: neither is named, or a file that judging needs is not; or there are answers that were
            made with other settings.
        DataError: a file is missing or of another form.
    """
    judge = check_common(options)
    questions = bench.read_questions(options.questions)
    prompts: dict[str, Any] = {}
    references: dict[int, list[str]] = {}
    if judge is not None:
        if options.judge_prompts is None:
            raise ConfigError(
                "--judge-prompts: expected the project's judge_prompts.jsonl, found none"
            )
        prompts = bench.read_prompts(options.judge_prompts)
        referenced = [q for q in questions if q.category in bench.REFERENCED]
        if referenced and options.reference_answers is None:
            raise ConfigError(
                f"--reference-answers: expected a file, for {len(referenced)} questions are of "
                f"{', '.join(bench.REFERENCED)}, found none"
            )
        if referenced:
            references = bench.read_answers(options.reference_answers, referenced)
    answers = options.output_dir / "model_answer" / f"{options.name}.jsonl"
    if options.model is not None:
        _answer(options, questions, answers)
    if judge is not None and options.is_writer:
        found = bench.read_answers(answers, questions)
        asked = bench.judge_prompts(questions, found, references, prompts)
        _judge(options, judge, questions, asked, common_settings([answers], questions="questions"))


def _answer(options: Namespace, questions: Sequence[bench.Question], file: Path) -> None:
    """Write the answers, if those of this run are not there."""
    sampling = Sampling(
        max_new_tokens=options.max_new_tokens, top_p=options.top_p, seed=options.seed
    )
    settings: Settings = vars(sampling) | {
        "temperature": bench.TEMPERATURES | {"others": bench.OTHER_TEMPERATURE},
        "questions": digest([[q.id, *q.turns] for q in questions]),
    }
    is_reused = file.exists() and not options.overwrite
    if is_reused:
        check_reused(file, settings)
    with kept_from_before(file), open_generator(options) as (generator, codec):
        settings |= model_settings(generator, codec)
        if is_reused:
            check_reused(file, settings)
            if generator.is_writer:
                logger.info("%s is there and used; --overwrite answers again", file)
            return
        with open_journal(generator, file, settings) as journal:
            answers = _two_turns(generator, codec, questions, sampling, journal)
            if journal is None:
                return
            lines = [_line(options, q, answers[q.id], generator.identity) for q in questions]
            write_answers(file, lines, settings, options)
            journal.remove()


def _two_turns(
    generator: Generator,
    codec: Codec,
    questions: Sequence[bench.Question],
    sampling: Sampling,
    journal: Journal | None,
) -> dict[int, list[str]]:
    """Answers by question; the second turn sees the first."""
    answers: dict[int, list[str]] = {q.id: [] for q in questions}
    for turn in (0, 1):
        asked = [q for q in questions if len(q.turns) > turn]
        requests = bench.requests(asked, answers, codec, sampling)
        title = f"turn {turn + 1}"
        done = complete_all(generator, codec, requests, journal=journal, title=title)
        for q in asked:
            answers[q.id].append(done[q.key(turn)].text.strip())
    return answers


def _line(
    options: Namespace, question: bench.Question, turns: Sequence[str], identity: str
) -> dict[str, Any]:
    digest = hashlib.sha256(f"{identity} {question.id} {list(turns)}".encode()).hexdigest()
    return {
        "question_id": question.id,
        "answer_id": digest[:22],
        "model_id": options.name,
        "choices": [{"index": 0, "turns": list(turns)}],
        "tstamp": time.time(),
    }


def _judge(
    options: Namespace,
    judge: Judge,
    questions: Sequence[bench.Question],
    prompts: Mapping[str, list[Message]],
    made_with: Settings | None,
) -> None:
    """Ask for the verdicts that are not there, and score."""
    label = judge.model.replace("/", "_")
    file = options.output_dir / "model_judgment" / f"{label}_single.jsonl"
    known = _known(file, judge, prompts)
    todo = {key: messages for key, messages in prompts.items() if key not in known}
    settings = {"judge": judge.model, "url": judge.url, "prompts": dict(prompts)}
    place = options.output_dir / f"mt-bench-{options.name}-judge"
    with Journal(place, settings=settings) as kept:
        asked = ask_all(judge, todo, journal=kept)
        texts = {key: Said(line["judgment"]) for key, line in known.items()} | asked
        found = [
            bench.Verdict(q, turn, bench.parse_rating(texts[q.key(turn)].verdict))
            for q in questions
            for turn in range(len(q.turns))
        ]
        # Read again: the file is that of all models, and another may have been judged meanwhile.
        own = (options.name, judge.model)
        others = [line for line in _judgments(file) if (line["model"], line["judge"][0]) != own]
        lines = [
            _judgment(options.name, judge, v, prompts[key], texts[key], known.get(key))
            for v in found
            for key in [v.question.key(v.turn)]
        ]
        write_records(file, [*others, *lines], overwrite=True)
        kept.remove()
    results = {
        "benchmark": "mt-bench",
        "model": options.name,
        "answers": made_with,
        "judge": judge_settings(judge, texts.values()),
        "scores": bench.score(found),
    }
    publish(results, report(results), options.output_dir / f"mt-bench-{options.name}.json")


def _judgments(file: Path) -> list[Record]:
    """Lines of earlier runs; judges whose names differ by a slash share a file."""
    return read_records(file) if file.exists() else []


def _known(file: Path, judge: Judge, prompts: Mapping[str, Sequence[Message]]) -> dict[str, Record]:
    """Lines of earlier runs by turn: of this judge, on the same messages, with a rating.

    The project itself, and earlier versions, do not write the system prompt; it is taken for the same.
    """
    lines = {
        (line.get("system_prompt"), line["user_prompt"]): line
        for line in _judgments(file)
        if line["judge"][0] == judge.model
        if bench.parse_rating(Said(line["judgment"], line.get("cut_at")).verdict) is not None
    }
    found: dict[str, Record] = {}
    unsure = 0
    for key, (system, user) in prompts.items():
        line = lines.get((system["content"], user["content"]))
        if line is None and (line := lines.get((None, user["content"]))) is not None:
            unsure += 1
        if line is not None:
            found[key] = line
    note = f" ({unsure} of them without their system prompt, taken for the present one)"
    log_reused(len(found), len(prompts), file, note if unsure else "")
    return found


def _judgment(
    model: str,
    judge: Judge,
    verdict: bench.Verdict,
    messages: Sequence[Message],
    said: Said,
    before: Record | None,
) -> Record:
    """A line as the project writes it, with the system prompt and, if it was cut, the limit of tokens.

    The score of what cannot be parsed is null, where the project writes -1. What was known `before`, such as
    the time, stays.
    """
    line = before or {
        "system_prompt": messages[0]["content"],
        "user_prompt": messages[-1]["content"],
        "judgment": said.text,
        "tstamp": time.time(),
    }
    cut = {} if said.cut_at is None else {"cut_at": said.cut_at}
    return (line | cut) | {
        "question_id": verdict.question.id,
        "model": model,
        "judge": [judge.model, bench.prompt_name(verdict.question, verdict.turn)],
        "score": verdict.rating,
        "turn": verdict.turn + 1,
    }


def report(results: Mapping[str, Any]) -> str:
    """The scores as text, and the table beside the paper's."""
    scores = results["scores"]
    rows = {"all": scores["all"]}
    rows |= {f"turn {turn}": value for turn, value in scores["turns"].items()}
    rows |= scores["categories"]
    lines = []
    means = aligned([with_error(part["mean"], part["error"]) for part in rows.values()])
    for (name, part), mean in zip(rows.items(), means, strict=True):
        line = f"{name:<14}{mean}"
        if part["unparsable"]:
            low, high = part["bounds"]
            line += (
                f"   {part['unparsable']} of {part['verdicts']} verdicts unparsable: between {low:.2f} "
                f"and {high:.2f}"
            )
        lines.append(line.rstrip())
    total = scores["all"]
    lines.append("±: standard error over questions, whose turns are one observation each")
    lines.append(f"unparsable verdicts: {total['unparsable']} of {total['verdicts']}")
    lines += [*cut_note(results["judge"]), ""]
    theirs = {model: (value,) for model, (_, _, value) in paper.CHAT.items()}
    ours, errors = {results["model"]: (total["mean"],)}, {results["model"]: (total["error"],)}
    lines.append(paper.table(("MT-Bench",), ours, theirs, errors=errors))
    return "\n".join(lines)
