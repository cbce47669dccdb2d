"""Conversations of very uneven length, and the flags of tuning on them."""

import json
import random
from pathlib import Path

from tests.helpers.tiny import Tiny


def conversations(count: int, *, seed: int) -> list[list[dict[str, str]]]:
    """Sums asked one after another; one in four is answered at length, and asked in a word."""
    generator = random.Random(seed)
    found = []
    for _ in range(count):
        turns = []
        if generator.random() < 0.2:
            turns.append({"role": "system", "content": "You answer sums."})
        for _ in range(generator.choice((1, 1, 2))):
            numbers = [generator.randrange(10) for _ in range(2)]
            question, answer = f"what is {' + '.join(map(str, numbers))}", str(sum(numbers))
            if generator.random() < 0.25:
                question, answer = "more", " ".join([question, "is", answer] * 8)
            turns.append({"role": "user", "content": question})
            turns.append({"role": "assistant", "content": answer})
        found.append(turns)
    return found


def write_jsonl(path: Path, records: list) -> Path:
    """JSON lines of anything."""
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def chat_flags(tiny: Tiny, data: Path, *more: object) -> tuple[object, ...]:
    """Of a chat tuning run; those of the tiny world that choose what counts do not go with it."""
    flags = list(tiny.flags())
    flags.remove("--eod-mask-loss")
    return (*flags, "--chat-data-path", data, *more)
