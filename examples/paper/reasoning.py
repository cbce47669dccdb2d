"""Word problems with reasoning paths in the shape of U33B, for the study in miniature.

    python examples/paper/reasoning.py --output reasoning.jsonl

U33B rewrites the answers of GSM8K's problems as several reasoning paths each. Here the problems are made: two
steps of arithmetic, two paths a problem, `query` and `response` joined into the `text` that
tools/preprocess_data.py reads. Fixed seed, no download.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from megatron_ext.data.atomic import write_atomically

_PROBLEMS = (
    "{name} buys {a} boxes of {b} {thing} and gives away {c}. How many {thing} are left?",
    "{name} has {a} shelves with {b} {thing} on each and sells {c} of them. How many {thing} remain?",
)
_PATHS = (
    "At first there are {a} * {b} = {product} {thing}. Without {c} of them, {product} - {c} = {left} are "
    "left. The answer is: {left}",
    "Let x be what is left. x + {c} = {a} * {b}, so x + {c} = {product} and x = {product} - {c} = {left}. "
    "The answer is: {left}",
)
_NAMES = ("Ada", "Ben", "Chen", "Dana", "Emil", "Fatma")
_THINGS = ("pens", "cups", "apples", "books", "stamps")


def paths(problems: int, rng: random.Random) -> list[str]:
    """Problems with each of their paths, shuffled."""
    texts: dict[str, None] = {}
    while len(texts) < len(_PATHS) * problems:
        a, b = rng.randint(2, 30), rng.randint(2, 30)
        fields = {"name": rng.choice(_NAMES), "thing": rng.choice(_THINGS), "a": a, "b": b}
        fields |= {"c": rng.randint(1, a * b - 1), "product": a * b}
        fields["left"] = a * b - fields["c"]
        query = rng.choice(_PROBLEMS).format(**fields)
        texts |= dict.fromkeys(f"{query}\n{path.format(**fields)}\n" for path in _PATHS)
    shuffled = list(texts)
    rng.shuffle(shuffled)
    return shuffled


def main() -> None:
    """Make and write the paths."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="JSON lines to write")
    parser.add_argument("--problems", type=int, default=3000)
    args = parser.parse_args()
    lines = [json.dumps({"text": text}) for text in paths(args.problems, random.Random(1))]
    write_atomically(args.output, "".join(f"{line}\n" for line in lines).encode(), overwrite=True)
    print(f"{args.output}: {len(lines):,} reasoning paths of {args.problems:,} problems")


if __name__ == "__main__":
    from tools.common import run_tool

    run_tool(main)
