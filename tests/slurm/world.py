"""The recipes at a size that takes seconds, as job scripts see it: variables and a file of sizes."""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

from tests.faults.world import STEPS, Place
from tests.helpers.entry import ROOT
from tests.helpers.tiny import forget_texts, preprocess, replay_texts, tool

SIZES = """\
# shellcheck shell=bash disable=SC2034 # common.sh reads these
source "{root}/examples/paper/sizes/mini.sh"
LAYERS=2 HIDDEN=32 FFN=80 HEADS=4 SEQ_LENGTH=64
# {steps} steps of 32 samples, of which unlearning forgets 16: there must be time to disturb them.
LEARN_BATCH=32 UNLEARN_BATCH=32 MICRO_BATCH=1
BASE_TOKENS=$(({steps} * 32 * 64)) BASE_WARMUP_ITERATIONS=2 FORGET_TOKENS=$(({steps} * 16 * 64))
LEARN_SAVE_INTERVAL=2 UNLEARN_SAVE_INTERVAL=2
"""


@dataclass(frozen=True)
class World:
    """Text, tokenizer and sizes.

    Attributes:
        settings: the variables of all jobs.
    """

    directory: Path
    settings: dict[str, str]

    def job(self, name: str, **more: str) -> tuple["Output", dict[str, str]]:
        """A folder for a job's output, and its variables."""
        output = Output(self.directory / name)
        return output, self.settings | {"OUT": str(output.directory)} | more


class Output(Place):
    """What a recipe writes in its OUT."""

    @property
    def save(self) -> Path:
        """Its checkpoints."""
        return self.directory


def build(directory: Path) -> World:
    """Make text, tokenizer and data sets with the product's own tools."""
    tokenizer = directory / "tokenizer.model"
    texts = {"real": replay_texts(), "synthetic": forget_texts()}
    for name, documents in texts.items():
        lines = (json.dumps({"text": text}) + "\n" for text in documents)
        (directory / f"{name}.jsonl").write_text("".join(lines))
    inputs = [directory / f"{name}.jsonl" for name in texts]
    tool("train_tokenizer", "--input", *inputs, "--vocab-size", 500, "--output", tokenizer)
    for name in texts:
        preprocess(directory / f"{name}.jsonl", directory / name, tokenizer=tokenizer)
    sizes = directory / "tiny.sh"
    sizes.write_text(SIZES.format(root=ROOT, steps=STEPS))
    # Slurm gives these jobs GPUs that are not there, which the entry point would take for broken ones.
    python = directory / "python"
    python.write_text(f'#!/bin/sh\nCUDA_VISIBLE_DEVICES= exec {sys.executable} "$@"\n')
    python.chmod(0o755)
    settings = {
        **{"SIZE": str(sizes), "TOKENIZER": str(tokenizer), "PYTHON": str(python)},
        "REAL": f"{directory}/real_text_document",
        "SYNTHETIC": f"{directory}/synthetic_text_document",
        # One for all jobs: their data are the same.
        "DATA_CACHE": str(directory / "cache"),
    }
    return World(directory, settings)
