#!/usr/bin/env python
"""The whole method on a laptop: pre-train, continue on synthetic text, unlearn it, measure.

    python examples/demo/run.py --output-dir runs/demo

Every stage is a call of a real tool, printed before it runs; a second call goes on where the first was
stopped. Text comes from the Python standard library, so nothing is downloaded.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from examples.demo.report import write_report  # noqa: E402

# Megatron's console line; with gradient ascent the sum of the terms is negative and stands elsewhere.
ITERATION = re.compile(r"iteration +(\d+)/ +(\d+) .*?(?:lm loss|replay loss): ([0-9.E+-]+)")


@dataclass(frozen=True)
class Settings:
    """Sizes of the demo; the defaults are for 2 cores.

    The unlearning weight is 0.1 instead of the paper's 0.01: a model of 3.3 M parameters is unlearned in
    tens of steps rather than the 1 B tokens of the paper.
    """

    base_steps: int = 400
    synth_steps: int = 180
    unlearn_steps: int = 50
    vocab_size: int = 4096
    hidden_size: int = 192
    layers: int = 4
    sequence_length: int = 256
    heads: int = 6
    batch: int = 16
    learning_rates: tuple[float, float, float] = (3e-3, 1e-3, 5e-4)  # base, synth, unlearn
    precision: tuple[str, ...] = ()
    samples: int = 400
    synthetic_share: float = 0.3
    forget_weight: float = 0.1
    # Data-parallel ranks of one thread each: a rank's threads that wait for a busy core stall its steps.
    ranks: int = min(2, os.cpu_count() or 1)

    def scaled(self, factor: float) -> Settings:
        """The same stages with a share of the steps, to try them out."""

        def steps(n: int) -> int:
            return max(4, round(n * factor))

        return replace(
            self,
            base_steps=steps(self.base_steps),
            synth_steps=steps(self.synth_steps),
            unlearn_steps=steps(self.unlearn_steps),
            samples=max(16, round(self.samples * factor)),
        )


PRESETS = {
    "laptop": Settings(),
    # About 100 M parameters on one GPU.
    "gpu": Settings(
        vocab_size=8192,
        hidden_size=768,
        layers=12,
        heads=12,
        sequence_length=1024,
        learning_rates=(6e-4, 3e-4, 1e-4),
        precision=("--bf16",),
        ranks=1,
    ),
}


@dataclass(frozen=True)
class Stage:
    """One command, and the steps that its progress bar counts (0 without steps)."""

    name: str
    title: str
    command: list[str]
    steps: int = 0

    def digest(self, before: str) -> str:
        """Changes with the command and with the stages before it, so that what is stale is run again."""
        return hashlib.sha256(f"{before} {shlex.join(self.command)}".encode()).hexdigest()[:16]


def stages(out: Path, settings: Settings) -> list[Stage]:
    """Every stage of the demo, in order."""
    python = sys.executable
    text, data = out / "text", out / "data"
    tokenizer = str(data / "tokenizer.model")
    plan = [
        Stage(
            "corpus",
            "Real text, synthetic question-answer pairs and instructions",
            [python, "examples/demo/corpus.py", "--output-dir", str(text)],
        ),
        Stage(
            "tokenizer",
            f"A SentencePiece tokenizer of {settings.vocab_size:,} pieces",
            [python, "tools/train_tokenizer.py"]
            + ["--input", str(text / "real.jsonl"), str(text / "synthetic.jsonl")]
            + ["--vocab-size", str(settings.vocab_size), "--output", tokenizer, "--overwrite"],
        ),
    ]
    for name in ("real", "synthetic", "real_heldout", "synthetic_heldout", "instruction"):
        plan.append(
            Stage(
                f"data-{name}",
                f"Tokenise {name.replace('_', ' ')} text",
                [python, "tools/preprocess_data.py", "--input", str(text / f"{name}.jsonl")]
                + ["--output-prefix", str(data / name), "--append-eod", "--overwrite"]
                + ["--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", tokenizer],
            )
        )
    plan += _training_stages(out, settings, tokenizer)
    models = [str(out / name) for name in ("base", "synth", "unlearn", "unlearn-ga")]
    held_out = [
        f"{name}={data / source}_text_document"
        for name, source in (
            ("real", "real_heldout"),
            ("synthetic", "synthetic_heldout"),
            ("instruction", "instruction"),
        )
    ]
    plan.append(
        Stage(
            "perplexity",
            "Perplexity of held-out text under the four models",
            [python, "tools/analyze.py", "perplexity", "--checkpoint", *models, "--data", *held_out]
            + ["--tokenizer-model", tokenizer, "--samples", str(settings.samples)]
            + ["--output", str(out / "perplexity.json")],
        )
    )
    return plan


def _training_stages(out: Path, settings: Settings, tokenizer: str) -> list[Stage]:
    """The four models, each through the entry point that a cluster runs."""
    real, synthetic = (
        str(out / "data" / f"{name}_text_document") for name in ("real", "synthetic")
    )
    share = settings.synthetic_share
    blend = [str(1 - share), real, str(share), synthetic]
    forget = ["--data-path", real, "--forget-data-path", synthetic]
    forget += ["--forget-weight", str(settings.forget_weight)]
    base_rate, synth_rate, unlearn_rate = map(str, settings.learning_rates)
    constant = ["--lr", synth_rate, "--lr-decay-style", "constant"]
    from_base = [*constant, "--pretrained-checkpoint", str(out / "base")]
    from_synth = ["--lr", unlearn_rate, "--lr-decay-style", "constant"]
    from_synth += ["--pretrained-checkpoint", str(out / "synth")]
    cosine = ["--lr", base_rate, "--lr-decay-style", "cosine"]
    cosine += ["--min-lr", f"{settings.learning_rates[0] / 10:g}"]
    cosine += ["--lr-warmup-iters", str(max(1, settings.base_steps // 20))]
    recipes = [
        ("base", "BaseLM: real text", settings.base_steps, ["--data-path", real, *cosine]),
        (
            "synth",
            f"SynthLM: continue on real text with {share:.0%} synthetic pairs",
            settings.synth_steps,
            ["--data-path", *blend, *from_base],
        ),
        (
            "unlearn",
            "UnlearnLM: forget the pairs, replay real text, stay near SynthLM",
            settings.unlearn_steps,
            [*forget, *from_synth],
        ),
        (
            "unlearn-ga",
            "UnlearnLM (GA): the same with gradient ascent, which has no lower bound",
            settings.unlearn_steps,
            [*forget, *from_synth, "--forget-loss", "gradient-ascent"],
        ),
    ]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    launcher += ["--nproc-per-node", str(settings.ranks)]
    return [
        Stage(
            name,
            title,
            [*launcher, "pretrain_unlearn.py", *_model(settings, tokenizer)]
            + ["--data-cache-path", str(out / "data" / "cache"), "--train-iters", str(steps)]
            + ["--load", str(out / name), "--save", str(out / name), "--save-interval", "150"]
            + ["--tensorboard-dir", str(out / "tensorboard" / name), *flags],
            steps,
        )
        for name, title, steps, flags in recipes
    ]


def _model(settings: Settings, tokenizer: str) -> list[str]:
    """Megatron's flags for the architecture of the paper, in miniature."""
    return [
        *("--num-layers", str(settings.layers), "--hidden-size", str(settings.hidden_size)),
        *("--ffn-hidden-size", str(settings.hidden_size * 8 // 3)),
        *("--num-attention-heads", str(settings.heads)),
        *("--seq-length", str(settings.sequence_length)),
        *("--max-position-embeddings", str(settings.sequence_length)),
        *("--position-embedding-type", "rope", "--normalization", "RMSNorm", "--swiglu"),
        *("--disable-bias-linear", "--untie-embeddings-and-output-weights"),
        *(
            "--hidden-dropout",
            "0",
            "--attention-dropout",
            "0",
            "--make-vocab-size-divisible-by",
            "64",
        ),
        # Half of a batch is forgotten, so a microbatch of all ranks may hold half of it at most.
        *("--micro-batch-size", str(settings.batch // 2 // settings.ranks)),
        *("--global-batch-size", str(settings.batch)),
        *("--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", tokenizer),
        *("--split", "1,0,0", "--eval-iters", "0", "--log-interval", "1"),
        *settings.precision,
    ]


def run_stage(stage: Stage, out: Path, digest: str) -> None:
    """Run a stage unless it is finished; its output goes to a log file, its progress to the screen."""
    log = out / "logs" / f"{stage.name}.log"
    started, finished = (out / state / stage.name for state in ("started", "finished"))
    if finished.is_file() and finished.read_text() == digest:
        print(f"== {stage.title}: finished before", flush=True)
        return
    print(f"\n== {stage.title}\n$ {_printable(stage.command)}", flush=True)
    for path in (started, finished, log):
        path.parent.mkdir(parents=True, exist_ok=True)
    if not (started.is_file() and started.read_text() == digest):
        # Checkpoints and losses of other settings must not be gone on with.
        for stale in (out / stage.name, out / "tensorboard" / stage.name):
            shutil.rmtree(stale, ignore_errors=True)
        started.write_text(digest)
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    environment.setdefault("OMP_NUM_THREADS", "1")
    with log.open("w") as sink:
        process = subprocess.Popen(
            stage.command,
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
        try:
            code = _follow(process, stage, sink)
        except BaseException:
            process.terminate()
            process.wait()
            raise
    if code != 0:
        tail = "".join(log.read_text(errors="replace").splitlines(keepends=True)[-15:])
        sys.exit(f"{tail}\nerror: stage {stage.name} ended with exit code {code}; the log is {log}")
    finished.write_text(digest)


def _follow(process: subprocess.Popen[str], stage: Stage, sink: object) -> int:
    """Copy a process's output to its log, and show steps as a bar and short tools' lines as they are."""
    assert process.stdout is not None
    bar = tqdm(total=stage.steps, unit="step", dynamic_ncols=True) if stage.steps else None
    for line in process.stdout:
        print(line, end="", file=sink, flush=True)  # type: ignore[call-overload]
        if bar is None:
            if stage.name != "perplexity":
                print(f"   {line.rstrip()}", flush=True)
            continue
        if match := ITERATION.search(line):
            bar.update(int(match[1]) - bar.n)
            bar.set_postfix_str(f"loss {float(match[3]):.3f}")
    if bar is not None:
        bar.close()
    return process.wait()


def _printable(command: list[str]) -> str:
    """The command as one would type it in the root of the checkout."""
    words = [word.replace(f"{ROOT}/", "") for word in command]
    words[0] = os.path.relpath(command[0], ROOT) if command[0].startswith(str(ROOT)) else "python"
    return shlex.join(words)


def main() -> None:
    """Run every stage and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output-dir", type=Path, default=ROOT / "runs" / "demo")
    parser.add_argument("--preset", choices=PRESETS, default="laptop")
    parser.add_argument(
        "--scale", type=float, default=1.0, help="share of the steps, to try it out"
    )
    options = parser.parse_args()
    settings = PRESETS[options.preset]
    if options.scale != 1:
        settings = settings.scaled(options.scale)
    out = options.output_dir.resolve()
    started = time.monotonic()
    digest = ""
    for stage in stages(out, settings):
        digest = stage.digest(digest)
        run_stage(stage, out, digest)
    print(write_report(out, settings.sequence_length))
    print(
        f"\n{time.monotonic() - started:.0f} s. To look at the losses: tensorboard --logdir {out}/tensorboard"
    )


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("\ninterrupted; the same command goes on from here")
