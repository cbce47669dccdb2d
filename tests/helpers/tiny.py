"""A tiny world for the real entry point: text, tokenizer, data sets, checkpoints and flags.

The text is fixed (this repository's licence, and sums), so that losses can be compared with those that
were written down earlier; the standard library's changes with each release of Python.
"""

import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from tests.helpers.entry import ROOT, Launch, run, succeed

VOCAB, SEQUENCE, LAYERS = 500, 64, 4
BATCH, FORGET = 16, 12  # of 16 samples 12 are forgotten: micro-batch 4 leaves one replay microbatch
ITERATIONS = 40  # of the base model
REFERENCE_ITERATION = 20

ARCHITECTURE = (
    *("--num-layers", LAYERS, "--hidden-size", 32, "--ffn-hidden-size", 80),
    *("--num-attention-heads", 4, "--group-query-attention", "--num-query-groups", 2),
    *("--position-embedding-type", "rope", "--normalization", "RMSNorm", "--swiglu"),
    *("--disable-bias-linear", "--untie-embeddings-and-output-weights"),
    *("--hidden-dropout", 0, "--attention-dropout", 0, "--init-method-std", 0.1),
    *("--seq-length", SEQUENCE, "--max-position-embeddings", SEQUENCE),
)
TRAINING = (
    *("--micro-batch-size", 2, "--global-batch-size", BATCH),
    *("--lr", 3e-3, "--min-lr", 3e-4, "--lr-decay-style", "cosine"),
    *("--log-interval", 1, "--eval-interval", 100, "--eval-iters", 0),
)
# The weights are far from each other and from 1, so that none can be confused with another.
WEIGHTS = (*("--forget-weight", 0.5, "--replay-weight", 0.7), *("--mitigation-weight", 1.3))


@dataclass(frozen=True)
class Tiny:
    """Where everything lies.

    Attributes:
        tokenizer: SentencePiece model of `VOCAB` pieces.
        replay: prefix of the data set to learn and to replay.
        forget: prefix of the data set to forget.
        base: checkpoint directory after `ITERATIONS` iterations on both.
        reference: the same run's checkpoint after `REFERENCE_ITERATION`.
    """

    directory: Path
    tokenizer: Path
    replay: Path
    forget: Path
    base: Path
    reference: Path

    def flags(self, *more: object) -> tuple[object, ...]:
        """Of every run, then more."""
        return (
            *(*ARCHITECTURE, *TRAINING),
            *("--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", self.tokenizer),
            # Documents end often and unevenly; their ends do not count, so no two microbatches have
            # the same number of tokens.
            *("--eod-mask-loss", "--split", "90,10,0"),
            # Datasets are indexed once for all runs.
            *("--data-cache-path", self.directory / "cache"),
            *more,
        )

    def objective(self, *more: object) -> tuple[object, ...]:
        """Of an unlearning run, wherever it starts."""
        return self.flags(
            *("--data-path", self.replay, "--forget-data-path", self.forget, *WEIGHTS),
            *("--forget-batch-size", FORGET, *more),
        )

    def unlearn(self, *more: object) -> tuple[object, ...]:
        """Of an unlearning run from the base, with an older reference, so that its KL is not 0."""
        start = ("--load", self.base, "--finetune", "--reference-load", self.reference)
        return self.objective(*start, *more)

    def plain(self, *more: object) -> tuple[object, ...]:
        """Of plain pre-training on both data sets."""
        return self.flags("--data-path", 1, self.replay, 1, self.forget, *more)


def build(directory: Path) -> Tiny:
    """Make text, tokenizer, data sets and the base model with the product's own tools."""
    tiny = Tiny(
        directory=directory,
        tokenizer=directory / "tokenizer.model",
        replay=directory / "replay_text_document",
        forget=directory / "forget_text_document",
        base=directory / "base",
        reference=directory / "reference",
    )
    texts = {"replay": list(replay_texts()), "forget": list(forget_texts())}
    for name, documents in texts.items():
        lines = (json.dumps({"text": text}) + "\n" for text in documents)
        (directory / f"{name}.jsonl").write_text("".join(lines))
    inputs = [directory / f"{name}.jsonl" for name in texts]
    tool("train_tokenizer", "--input", *inputs, "--vocab-size", VOCAB, "--output", tiny.tokenizer)
    for name in texts:
        preprocess(directory / f"{name}.jsonl", directory / name, tokenizer=tiny.tokenizer)
    launch = Launch(
        tiny.plain("--train-iters", ITERATIONS, "--save", tiny.base)
        + ("--save-interval", REFERENCE_ITERATION)
    )
    succeed(run(launch, directory / "tensorboard" / "base"))
    at_iteration(tiny.base, REFERENCE_ITERATION, tiny.reference)
    return tiny


def preprocess(source: Path, prefix: Path, *, tokenizer: Path) -> None:
    """Tokenise a JSONL file with the product's tool."""
    tool(
        *("preprocess_data", "--input", source, "--output-prefix", prefix, "--append-eod"),
        *("--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", tokenizer),
    )


def tool(name: str, *arguments: object) -> None:
    """Run one of the product's tools."""
    command = [sys.executable, str(ROOT / "tools" / f"{name}.py"), *map(str, arguments)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, f"{name}: {result.stderr}"


def write_tokens(prefix: Path, *, documents: int, token: int = 2) -> Path:
    """A data set of documents of one token, by default the end of a document itself; its prefix."""
    # Ranks import this module, and must not import Megatron before the CPU answers for CUDA.
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
    for _ in range(documents):
        builder.add_document(torch.tensor([token]), [1])
    builder.finalize(f"{prefix}.idx")
    return prefix


def at_iteration(directory: Path, iteration: int, view: Path) -> Path:
    """A checkpoint directory whose latest iteration is an earlier one of another directory."""
    view.mkdir()
    os.symlink(directory / f"iter_{iteration:07d}", view / f"iter_{iteration:07d}")
    (view / "latest_checkpointed_iteration.txt").write_text(str(iteration))
    return view


def replay_texts() -> Iterator[str]:
    """Paragraphs of the licence, with runs of very short documents between them."""
    generator = random.Random(1)
    words = (ROOT / "LICENSE").read_text().split()
    for start in range(0, len(words), 40):
        yield " ".join(words[start : start + generator.randrange(5, 80)])
        for _ in range(generator.choice((0, 0, 1, 30))):
            yield generator.choice(words)


def forget_texts() -> Iterator[str]:
    """Sums in one rigid format, long and short ones."""
    generator = random.Random(2)
    for _ in range(300):
        numbers = [generator.randrange(100) for _ in range(generator.choice((2, 2, 3, 12)))]
        total = " + ".join(map(str, numbers))
        yield f"Question: what is {total}?\n**Answer:** {sum(numbers)}"
        for _ in range(generator.choice((0, 0, 0, 0, 0, 0, 30))):
            yield str(generator.randrange(10))
