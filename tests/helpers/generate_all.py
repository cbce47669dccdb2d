"""Generates and scores in many ways under one layout, and writes what each rank found.

For tests: arguments are a Megatron checkpoint, the tensor- and pipeline-parallel size, and an output prefix.
"""

import json
import os
import sys
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_ext.runtime import cpu

cpu.enable()

from megatron_ext.evaluation.backends import open_generator  # noqa: E402
from megatron_ext.evaluation.sampling import Request, Sampling, Scored  # noqa: E402

NEW = 12
# Of very different lengths; in batches of two, so that one is padded out and rows wait for each other. The
# text of the second alone ends.
PROMPTS = ["the License", "in the", "copyright notice for the work " * 6, "a", "Grant of patents"]
SETTINGS = {
    "greedy": Sampling(max_new_tokens=NEW),
    "sampled": Sampling(max_new_tokens=NEW, temperature=0.9, top_p=0.8),
    "other seed": Sampling(max_new_tokens=NEW, temperature=0.9, seed=1),
}


def options(model: Path, backend: str, tensor: int = 1, pipeline: int = 1) -> Namespace:
    """A command line."""
    return Namespace(
        model=model,
        backend=backend,
        tokenizer_type=None,
        tokenizer_model=None,
        chat_template=None,
        micro_batch_size=2,
        tensor_model_parallel_size=tensor,
        pipeline_model_parallel_size=pipeline,
    )


def recompute(generator: Any, request: Request) -> list[int]:
    """Greedy tokens without the cache: each is the first of a call, which reads all before it anew."""
    new: list[int] = []
    one = replace(request.sampling, max_new_tokens=1)
    while len(new) < NEW and not (new and request.is_finished(new)):
        longer = replace(request, tokens=[*request.tokens, *new], sampling=one)
        new += generator.complete([longer])[0]
    return new


def complete(generator: Any, codec: Any) -> dict[str, list]:
    """Tokens of all prompts, with and without the cache, greedy and sampled; scores of the greedy ones."""
    found: dict[str, list] = {}
    size = generator.batch_size
    for name, sampling in SETTINGS.items():
        requests = [codec.prompt(f"{i}", text, sampling) for i, text in enumerate(PROMPTS)]
        batches = [requests[i : i + size] for i in range(0, len(requests), size)]
        found[name] = [tokens for batch in batches for tokens in generator.complete(batch)]
    requests = [codec.prompt(f"{i}", text, SETTINGS["greedy"]) for i, text in enumerate(PROMPTS)]
    found["recomputed"] = [recompute(generator, request) for request in requests]
    found["texts"] = [codec.completion(requests[0], found["greedy"][0]).text]
    pairs = zip(requests, found["greedy"], strict=True)
    scored = [Scored(tokens=[*r.tokens, *new], start=len(r.tokens)) for r, new in pairs]
    scored.append(Scored(tokens=[5, 6, 7], start=1))
    batches = [scored[i : i + size] for i in range(0, len(scored), size)]
    with passes(generator) as count:
        found["scores"] = [list(score) for batch in batches for score in generator.score(batch)]
    found["passes"] = count
    return found


@contextmanager
def passes(generator: Any) -> Iterator[list[int]]:
    """Counts the batches that Megatron's model reads on this rank."""
    count = [0]

    def read(*_: Any) -> None:
        count[0] += 1

    model = getattr(generator, "_chunk", None)
    hook = model.register_forward_pre_hook(read) if model else nullcontext()
    with hook:
        yield count


def main() -> None:
    """Run one layout."""
    model, tensor, pipeline, output = sys.argv[1:]
    chosen = options(Path(model), "megatron", int(tensor), int(pipeline))
    with open_generator(chosen) as opened:
        found = complete(*opened)
    Path(f"{output}.{os.environ.get('RANK', '0')}").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
