"""The stages of the demo: its sizes, and the command of each stage."""

from __future__ import annotations

import hashlib
import os
import shlex
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path


@dataclass(frozen=True)
class Settings:
    """Sizes of the demo; the defaults are for 2 cores.

    The unlearning weight is 0.1 instead of the paper's 0.01: a model of 3.3 M parameters is unlearned in
    tens of steps rather than the 1 B tokens of the paper. A pre-trained one is by the paper's own weight.
    """

    base_steps: int = 400
    synth_steps: int = 180
    unlearn_steps: int = 40
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
    on_cpu: bool = True  # GPUs are hidden: two ranks would need two, and the digits would be others
    # Folder of the Hugging Face model that is BaseLM; without one it is trained here.
    model: str = ""

    def of_model(self, folder: str) -> Settings:
        """The same stages with a pre-trained model: with 135 M parameters an hour on 2 cores."""
        return replace(
            self,
            model=folder,
            base_steps=0,
            synth_steps=40,
            unlearn_steps=40,
            sequence_length=512,
            batch=8,
            learning_rates=(0, 1e-4, 5e-5),
            samples=150,
            synthetic_share=0.5,
            forget_weight=0.01,
            ranks=1,  # another would double the memory
        )

    def scaled(self, factor: float) -> Settings:
        """The same stages with a share of the steps, to try them out."""

        def steps(n: int) -> int:
            return max(4, round(n * factor))

        return replace(
            self,
            base_steps=steps(self.base_steps),
            synth_steps=steps(self.synth_steps),
            unlearn_steps=steps(self.unlearn_steps),
            samples=max(8, round(self.samples * factor)),
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
        on_cpu=False,
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


def choose_device(settings: Settings) -> None:
    """Hide GPUs from all that this process starts, where the sizes are for CPUs, and share its cores."""
    if settings.ranks > 1 or not settings.model:
        os.environ.setdefault("OMP_NUM_THREADS", "1")
    if not settings.on_cpu:
        return
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    if shutil.which("nvidia-smi"):
        print("On the CPU, with CUDA_VISIBLE_DEVICES= for all commands; --preset gpu uses a GPU.")


def stages(out: Path, settings: Settings) -> Iterator[Stage]:
    """Every stage of the demo, in order; the flags of an imported model are there once it is imported."""
    python = sys.executable
    text, data = out / "text", out / "data"
    yield Stage(
        "corpus",
        "Real text, synthetic question-answer pairs and instructions",
        [python, "examples/demo/corpus.py", "--output-dir", str(text), "--overwrite"],
    )
    if settings.model:
        yield Stage(
            "base",
            f"BaseLM: import {settings.model}",
            [python, "tools/convert_checkpoint.py", "import", "--source", settings.model]
            + ["--output", str(out / "base"), "--overwrite"],
        )
    else:
        yield Stage(
            "tokenizer",
            f"A SentencePiece tokenizer of {settings.vocab_size:,} pieces",
            [python, "tools/train_tokenizer.py"]
            + ["--input", str(text / "real.jsonl"), str(text / "synthetic.jsonl")]
            + ["--vocab-size", str(settings.vocab_size)]
            + ["--output", str(data / "tokenizer.model"), "--overwrite"],
        )
    tokenizer = _tokenizer(out, settings)
    for name in ("real", "synthetic", "real_heldout", "synthetic_heldout", "instruction"):
        yield Stage(
            f"data-{name}",
            f"Tokenise {name.replace('_', ' ')} text",
            [python, "tools/preprocess_data.py", "--input", str(text / f"{name}.jsonl")]
            + ["--output-prefix", str(data / name), "--append-eod", "--overwrite", *tokenizer],
        )
    yield from _training_stages(out, settings, tokenizer)
    models = [str(out / name) for name in ("base", "synth", "unlearn", "unlearn-ga")]
    held_out = [
        f"{name}={data / source}_text_document"
        for name, source in (
            ("real", "real_heldout"),
            ("synthetic", "synthetic_heldout"),
            ("instruction", "instruction"),
        )
    ]
    yield Stage(
        "perplexity",
        "Perplexity of held-out text under the four models",
        [python, "tools/analyze.py", "perplexity", "--checkpoint", *models, "--data", *held_out]
        + [*tokenizer, "--samples", str(settings.samples)]
        + ["--length", str(settings.sequence_length)]
        + ["--output", str(out / "perplexity.json"), "--overwrite"],
    )
    for model in models if settings.model else ():  # one that is trained here cannot speak
        name = Path(model).name
        yield Stage(
            f"answers-{name}",
            f"What {name} says",
            [python, "tools/generate.py", "--model", model]
            + ["--input", "examples/demo/prompts.jsonl"]
            + ["--output", str(out / "answers" / f"{name}.jsonl"), "--overwrite"]
            + ["--max-new-tokens", "60", "--temperature", "0"],
        )


def _tokenizer(out: Path, settings: Settings) -> list[str]:
    """Flags of the tokenizer that is trained, or came with the model."""
    kind, place = "SentencePieceTokenizer", out / "data" / "tokenizer.model"
    if settings.model:
        kind, place = "HuggingFaceTokenizer", out / "base" / "huggingface"
    return ["--tokenizer-type", kind, "--tokenizer-model", str(place)]


def _training_stages(out: Path, settings: Settings, tokenizer: list[str]) -> Iterator[Stage]:
    """The models, each through the entry point that a cluster runs."""
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
    if settings.model:
        del recipes[0]
    architecture = _imported(out) if settings.model else _model(settings)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    launcher += ["--nproc-per-node", str(settings.ranks)]
    for name, title, steps, flags in recipes:
        yield Stage(
            name,
            title,
            [*launcher, "pretrain_unlearn.py", *architecture, *_run(settings), *tokenizer]
            + ["--data-cache-path", str(out / "data" / "cache"), "--train-iters", str(steps)]
            + ["--load", str(out / name), "--save", str(out / name), "--save-interval", "150"]
            + ["--tensorboard-dir", str(out / "tensorboard" / name), *flags],
            steps,
        )


def _imported(out: Path) -> list[str]:
    """Megatron's flags for the architecture of an imported model; none before it is imported."""
    return (out / "base" / "ARGS.txt").read_text().split()


def _run(settings: Settings) -> list[str]:
    """Flags of every run."""
    return [
        *("--seq-length", str(settings.sequence_length)),
        # Half of a batch is forgotten, so a microbatch of all ranks may hold half of it at most.
        *("--micro-batch-size", str(settings.batch // 2 // settings.ranks)),
        *("--global-batch-size", str(settings.batch)),
        *("--split", "1,0,0", "--eval-iters", "0", "--log-interval", "1"),
        *settings.precision,
    ]


def _model(settings: Settings) -> list[str]:
    """Megatron's flags for the architecture of the paper, in miniature."""
    return [
        *("--num-layers", str(settings.layers), "--hidden-size", str(settings.hidden_size)),
        *("--ffn-hidden-size", str(settings.hidden_size * 8 // 3)),
        *("--num-attention-heads", str(settings.heads)),
        *("--max-position-embeddings", str(settings.sequence_length)),
        *("--position-embedding-type", "rope", "--normalization", "RMSNorm", "--swiglu"),
        *("--disable-bias-linear", "--untie-embeddings-and-output-weights"),
        *("--hidden-dropout", "0", "--attention-dropout", "0"),
        *("--make-vocab-size-divisible-by", "64"),
    ]
