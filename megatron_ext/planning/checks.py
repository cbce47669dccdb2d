"""What a run would refuse, and what this plan does not know, among the flags of a run."""

from __future__ import annotations

import difflib
from argparse import Namespace
from collections.abc import Sequence

from megatron_ext.batches import check_length
from megatron_ext.exceptions import ConfigError
from megatron_ext.values import check_schedule, check_sizes, check_training

_TABLES = ("learned_absolute", "relative")  # positions with weights
_MISTYPED = 0.87  # of `difflib`; `--tensor-parallel-size` has 0.88 with Megatron's name


def check_spelling(words: Sequence[str], *, known: Sequence[str], place: str = "") -> None:
    """Refuse a flag that is almost one that decides about cost; the plan would be without it.

    Args:
        words: of the command line.
        known: the flags that it may be.
        place: where they belong, if not where they are.

    Raises:
        ConfigError: names both.
    """
    for word in words:
        name = word.partition("=")[0].replace("_", "-")
        like = difflib.get_close_matches(name, known, n=1, cutoff=_MISTYPED)
        if name.startswith("--") and like:
            raise ConfigError(f"{word}: expected {like[0]}{place}, found an unknown flag")


def check_model(flags: Namespace) -> None:
    """Refuse what is not among the models of `architecture`.

    Raises:
        ConfigError: names the flag.
    """
    if flags.attention_backend == "unfused":
        raise ConfigError("--attention-backend unfused is not supported by the plan")
    if flags.optimizer != "adam":
        raise ConfigError(
            f"--optimizer: expected adam, the only one the plan supports, found {flags.optimizer}"
        )
    for name in ("swiglu", "disable-bias-linear"):
        if not getattr(flags, name.replace("-", "_")):
            raise ConfigError(
                f"--{name}: expected, found none; the plan supports Llama-like models only"
            )
    if flags.normalization != "RMSNorm":
        raise ConfigError(
            f"--normalization: expected RMSNorm, the only one the plan supports, found {flags.normalization}"
        )
    if flags.position_embedding_type in _TABLES and not flags.use_rotary_position_embeddings:
        raise ConfigError(
            "--position-embedding-type: expected rope or another one without weights (the plan supports no "
            f"other), found {flags.position_embedding_type}"
        )


def check_run(flags: Namespace) -> None:
    """Refuse what the run would, in its words.

    Raises:
        ConfigError: names the flag, what was expected and what was found.
    """
    check_training(flags)
    check_sizes(flags)
    if flags.train_iters is None and flags.train_samples is None:
        return  # the plan is of one step, or the data of chat tuning set the length
    check_schedule(flags)
    if not flags.skip_train:
        check_length(flags)
