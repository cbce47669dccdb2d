"""The paper's recipes as a table, a way to run them, and a way to read what they would start."""

import os
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import sentencepiece

from tests.helpers.entry import ROOT
from tests.unit.test_plan import write_index

RECIPES = ROOT / "examples" / "paper"
MINI = RECIPES / "sizes" / "mini.sh"


@dataclass(frozen=True)
class Recipe:
    """A row of the paper's table; `forget` names the variable of what is forgotten."""

    start: str | None
    data: tuple[str, ...]
    tokens: int | None  # learned, or forgotten
    lr: str
    batch: int
    forget: str | None = None
    flags: tuple[str, ...] = ()


BILLION = 10**9
TABLE = {
    "base_lm": Recipe(None, ("REAL",), 1000 * BILLION, "1e-4", 1024),
    "synth_lm": Recipe("BASE_LM", ("REAL", "SYNTHETIC"), 300 * BILLION, "5e-5", 1024),
    "refine_lm": Recipe("SYNTH_LM", ("REAL",), 300 * BILLION, "5e-5", 1024),
    "unlearn_lm": Recipe("SYNTH_LM", ("REAL",), BILLION, "5e-5", 256, "SYNTHETIC"),
    "unlearn_lm_ga": Recipe(
        *("SYNTH_LM", ("REAL",), BILLION, "5e-5", 256, "SYNTHETIC"),
        ("--forget-loss", "gradient-ascent"),
    ),
    "mix_synth_lm": Recipe("BASE_LM", ("REAL", "SYNTHETIC"), 40 * BILLION, "5e-5", 1024),
    "non_synth_lm": Recipe("BASE_LM", ("REAL",), 40 * BILLION, "5e-5", 1024),
    "synth_lm_u33b": Recipe("BASE_LM", ("REAL", "U33B"), 40 * BILLION, "5e-5", 1024),
    "unlearn_lm_u33b": Recipe("SYNTH_LM_U33B", ("REAL",), BILLION, "5e-5", 256, "U33B"),
    "chat": Recipe("MODEL", ("CHAT_DATA",), None, "2e-5", 64),
}


@dataclass(frozen=True)
class World:
    """Datasets without content, a tokenizer, an empty checkpoint, and what stands for programs."""

    directory: Path
    settings: dict[str, str]

    def variables(self, name: str) -> dict[str, str]:
        """What a recipe needs, and nothing else."""
        recipe = TABLE[name]
        needed = ("OUT", "TOKENIZER", recipe.start, *recipe.data, recipe.forget)
        return {key: self.settings[key] for key in needed if key is not None}

    def run(self, name: str, *words: str, without: str = "", **more: str):
        """Start a recipe; a dry run unless PYTHON or the words say otherwise."""
        environment = {key: os.environ[key] for key in ("PATH", "HOME") if key in os.environ}
        environment |= {"PYTHON": sys.executable} | self.variables(name) | more
        environment.pop(without, None)
        return subprocess.run(
            ["bash", str(RECIPES / f"{name}.sh"), *words],
            **{"cwd": self.directory, "env": environment, "text": True, "capture_output": True},
        )

    def refusal(self, name: str, *words: str, **more: str) -> str:
        """The one line with which a recipe refuses."""
        result = self.run(name, *words, **more)
        assert (result.returncode, result.stdout) == (2, "")
        lines = result.stderr.splitlines()
        assert len(lines) == 1, result.stderr
        return lines[0]

    def command(self, name: str, **more: str) -> list[str]:
        """The words that a dry run says it would start."""
        result = self.run(name, "--dry-run", **more)
        assert result.returncode == 0, result.stderr
        return shlex.split(result.stdout.splitlines()[0])


def build(directory: Path) -> World:
    """Make what the recipes need; nothing of it can be trained on."""
    (directory / "text").write_text("\n".join(f"word{i} and number {i * i}" for i in range(400)))
    sentencepiece.SentencePieceTrainer.train(
        input=str(directory / "text"),
        model_prefix=str(directory / "tokenizer"),
        vocab_size=300,
        minloglevel=2,
    )
    checkpoint = directory / "trained"
    checkpoint.mkdir()
    (checkpoint / "latest_checkpointed_iteration.txt").write_text("10")
    (directory / "chat.jsonl").write_text("{}\n")
    # In argv's order, one a line, with the environment that ranks inherit.
    executable(directory / "echo-words", 'printf "%s\\n" "OMP=$OMP_NUM_THREADS" "$@"')
    web, code = (
        write_index(directory / name, 10**n, 1000) for name, n in (("web", 9), ("code", 8))
    )
    settings = {
        "OUT": str(directory / "out"),
        "TOKENIZER": str(directory / "tokenizer.model"),
        "REAL": f"3 {web} 1 {code}",
        "SYNTHETIC": write_index(directory / "qa", 10**7, 1000),
        "U33B": write_index(directory / "u33b", 10**7, 1000),
        "CHAT_DATA": str(directory / "chat.jsonl"),
    }
    starts = {recipe.start for recipe in TABLE.values() if recipe.start}
    return World(directory, settings | dict.fromkeys(starts, str(checkpoint)))


def executable(path: Path, text: str) -> Path:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def after(words: list[str], flag: str) -> list[str]:
    """The values of a flag that is given once."""
    assert words.count(flag) == 1, f"{flag} in {words}"
    rest = words[words.index(flag) + 1 :]
    return rest[: next((i for i, word in enumerate(rest) if word.startswith("--")), None)]
