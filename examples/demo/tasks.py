"""Tasks and conversations of the miniature, made like the demo's corpus: no download, the same on every run.

    python examples/demo/tasks.py --output-dir DIR

- `demo/instructions/test.jsonl`: requests with instructions that rules check (case, prefix, length, format,
  language), about sums and names that are in no training text.
- `demo/sums/test.jsonl`, `demo/definitions/test.jsonl`: choices on sums and on documented names that no
  training text holds; `demo/definitions_seen/test.jsonl`: on names that the synthetic pairs are made from.
- `chat.jsonl`: conversations for chat tuning, about sums and names of their own. Of the instructions it
  shows how to follow some, and never two at once.

`tools/evaluate.py harness --data-dir DIR --tasks demo_instructions demo_sums demo_definitions
demo_definitions_seen` runs them.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from examples.demo import corpus, wording
from megatron_ext.data.atomic import AtomicFiles
from megatron_ext.evaluation.rules import KINDS, follows

Record = dict[str, Any]

_CHAT = 4000
_PER_KIND = 40
_CHOICES = 4
_NAMES = ("demo/instructions", "demo/sums", "demo/definitions", "demo/definitions_seen")
_ASK: dict[str, tuple[str, ...]] = {
    "upper": ("Write in capital letters only.", "Answer in UPPER CASE."),
    "lower": ("Write in small letters only.", "Answer in lower case, without capitals."),
    "prefix": ('Begin your answer with "{}".', 'The first words must be "{}".'),
    "at_most_words": ("Use at most {} words.", "Answer in {} words or fewer."),
    "bullets": (
        'Answer as a list of {} lines that begin with "- ".',
        'Give {} lines, each after "- ".',
    ),
    "json": ("Answer as a JSON object.", 'Reply with JSON: {{"answer": ...}}.'),
    "chinese": ("Answer in Chinese.", "Reply in Chinese, please."),
    "english": ("Answer in English.", "Reply in English, please."),
}
# Kinds that one answer can follow together, whatever their rules.
_PAIRS = (["case", "length"], ["case", "format"], ["prefix", "length"])
_PREFIXES = ("Sure:", "My answer:", "In short:", "Well,")


@dataclass(frozen=True)
class Fact:
    """A question with its answer; of sums also in Chinese."""

    question: str
    answer: str
    chinese: str | None = None


def facts_of(sums: Sequence[wording.Sum], entries: Sequence[corpus.Entry]) -> list[Fact]:
    """Sums and documented names as questions, in turn while there are both."""
    words = {"+": "plus", "-": "minus", "*": "times"}
    first = [
        Fact(
            f"What is {s.left} {words[s.operator]} {s.right}?",
            f"It is {s.result}.",
            f"答案是{s.result}。",
        )
        for s in sums
    ]
    second = [Fact(f"What does the {e.kind} {e.name} stand for?", e.lead) for e in entries]
    return [fact for pair in zip(first, second, strict=False) for fact in pair]


def argument_of(rule: str, rng: random.Random) -> str | int | None:
    """What an instruction asks for."""
    if rule == "prefix":
        return rng.choice(_PREFIXES)
    if rule == "at_most_words":
        return rng.choice((3, 5, 8))
    return rng.choice((2, 3)) if rule == "bullets" else None


def comply(rule: str, argument: str | int | None, fact: Fact) -> str:
    """An answer that follows the instruction."""
    words = fact.answer.split()
    match rule:
        case "upper":
            return fact.answer.upper()
        case "lower":
            return fact.answer.lower()
        case "prefix":
            return f"{argument} {fact.answer}"
        case "at_most_words":
            return " ".join(words[: int(str(argument))])
        case "bullets":
            size = -(-len(words) // int(str(argument)))
            parts = [words[i * size : (i + 1) * size] or ["..."] for i in range(int(str(argument)))]
            return "\n".join("- " + " ".join(part) for part in parts)
        case "json":
            return json.dumps({"answer": fact.answer})
        case "chinese":
            assert fact.chinese is not None
            return fact.chinese
    return fact.answer


def instructions(facts: Sequence[Fact], rng: random.Random) -> list[Record]:
    """Requests: of each kind `_PER_KIND` with one instruction, and as many with two."""
    kinds = sorted(set(KINDS.values()))
    rules = {kind: [rule for rule in KINDS if KINDS[rule] == kind] for kind in kinds}
    wanted = [[kind] for kind in kinds for _ in range(_PER_KIND)]
    wanted += [rng.choice(_PAIRS) for _ in range(_PER_KIND)]
    sums = [fact for fact in facts if fact.chinese is not None]
    records = []
    for number, group in enumerate(wanted):
        chosen = [rng.choice(rules[kind]) for kind in group]
        fact = (sums if "chinese" in chosen else facts)[number % len(sums)]
        parts = [(rule, argument_of(rule, rng)) for rule in chosen]
        asked = [rng.choice(_ASK[rule]).format(argument) for rule, argument in parts]
        items = [{"rule": rule, "argument": str(argument or "")} for rule, argument in parts]
        records.append({"prompt": " ".join([fact.question, *asked]), "rules": items})
    return records


def conversations(facts: Sequence[Fact], rng: random.Random) -> list[Record]:
    """Half of them with an instruction that is followed, half without one."""
    records = []
    for fact in facts:
        question, answer = fact.question, fact.answer
        if rng.random() < 0.5:
            rule = rng.choice([rule for rule in KINDS if rule != "chinese" or fact.chinese])
            argument = argument_of(rule, rng)
            question = f"{question} {rng.choice(_ASK[rule]).format(argument)}"
            answer = comply(rule, argument, fact)
            assert follows(rule, argument, answer), (rule, argument, answer)
        turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        records.append({"messages": turns})
    return records


def sum_choices(sums: Sequence[wording.Sum], rng: random.Random) -> list[Record]:
    """Each with its result among near ones."""
    records = []
    for s in sums:
        near = [s.result + d for d in (-100, -20, -10, -2, -1, 1, 2, 10, 20, 100)]
        wrong = rng.sample([n for n in near if n >= 0], _CHOICES - 1)
        question = f"What is {s.left} {s.operator} {s.right}?\nAnswer:"
        records.append(_choice(question, str(s.result), [str(n) for n in wrong], rng))
    return records


def definition_choices(
    entries: Sequence[corpus.Entry], count: int, rng: random.Random
) -> list[Record]:
    """Each name with what it means among the meanings of other names."""
    records = []
    for entry in rng.sample(list(entries), min(count, len(entries))):
        others = sorted({e.lead for e in entries} - {entry.lead})
        question = f"What does the {entry.kind} {entry.name} stand for?\nAnswer:"
        records.append(_choice(question, entry.lead, rng.sample(others, _CHOICES - 1), rng))
    return records


def _choice(question: str, right: str, wrong: list[str], rng: random.Random) -> Record:
    choices = [right, *wrong]
    rng.shuffle(choices)
    return {"question": question, "choices": choices, "answer": choices.index(right)}


def build() -> dict[str, list[Record]]:
    """All files, by name."""
    entries: dict[str, list[corpus.Entry]] = {"train": [], "heldout": [], "instruction": []}
    for module in corpus.standard_library():
        entries[corpus.split_of(module.name)] += [e for e in module.entries if e.lead]
    sums = corpus.split_sums(_CHAT)
    rng = random.Random(3)
    names = list(entries["train"])
    rng.shuffle(names)
    return {
        "demo/instructions": instructions(
            facts_of(sums["instruction"], entries["instruction"]), rng
        ),
        "demo/sums": sum_choices(sums["heldout"], rng),
        "demo/definitions": definition_choices(entries["heldout"], 150, rng),
        "demo/definitions_seen": definition_choices(entries["train"], 300, rng),
        "chat": conversations(facts_of(sums["further"], names), rng),
    }


def write(records: dict[str, list[Record]], directory: Path, *, overwrite: bool) -> list[Path]:
    """Write the files together, or none; returns their paths."""
    paths = [
        directory / (f"{name}/test.jsonl" if name in _NAMES else f"{name}.jsonl")
        for name in records
    ]
    with AtomicFiles(paths, overwrite=overwrite) as files:
        for path, lines in zip(paths, records.values(), strict=True):
            for record in lines:
                files[path].write((json.dumps(record, ensure_ascii=False) + "\n").encode())
        files.commit()
    return paths


def main() -> None:
    """Make and write the files, and print their sizes."""
    parser = argparse.ArgumentParser(description="Make the tasks of the miniature.")
    parser.add_argument("--output-dir", type=Path, required=True)
    parser.add_argument("--overwrite", action="store_true", help="replace existing files")
    args = parser.parse_args()
    records = build()
    for path, lines in zip(
        write(records, args.output_dir, overwrite=args.overwrite), records.values(), strict=True
    ):
        print(f"{path.relative_to(args.output_dir)!s:<34}{len(lines):>7,}")


if __name__ == "__main__":
    from tools.common import run_tool

    run_tool(main)
