"""The settings of unlearning, chat tuning and logs: a field is a flag, its docstring the flag's help text.

arXiv 2406.12397 gives the objective and its weights; the defaults here are the paper's.
"""

import math
from dataclasses import dataclass, field
from typing import Any, Literal

from megatron_ext.exceptions import ConfigError, flag_name

_LIST: dict[str, Any] = {"argparse_meta": {"nargs": "+", "type": str}}


@dataclass(kw_only=True)
class UnlearnConfig:
    """What is forgotten, how strongly, and against which reference."""

    forget_data_path: list[str] | None = field(default=None, metadata=_LIST)
    """Data sets to forget, as weights and prefixes in the syntax of --data-path, split by --split. This flag
    turns unlearning on; --data-path then names the data sets that are replayed."""

    forget_train_data_path: list[str] | None = field(default=None, metadata=_LIST)
    """Like --forget-data-path for the training split alone; goes with --train-data-path."""

    forget_valid_data_path: list[str] | None = field(default=None, metadata=_LIST)
    """Like --forget-data-path for the validation split alone; goes with --valid-data-path."""

    forget_test_data_path: list[str] | None = field(default=None, metadata=_LIST)
    """Like --forget-data-path for the test split alone; goes with --test-data-path."""

    allow_data_overlap: bool = False
    """Run although some text is both forgotten and replayed. Without this flag such a run is refused. The
    check compares files and, by their manifests, content and a sample of the documents;
    tools/verify_data.py compares all documents."""

    forget_batch_size: int | None = None
    """Samples of each global batch that are forgotten; the rest are replayed. A multiple of
    micro-batch size times data-parallel size. Default: half of the global batch."""

    forget_loss: Literal["bounded", "gradient-ascent"] = "bounded"
    """Forgetting loss of a token: bounded is -log(1 - p), which is at least 0; gradient-ascent is
    +log p, which has no lower bound (the paper's ablation)."""

    forget_weight: float = 0.01
    """Weight of the forgetting loss, averaged over the forgotten tokens of the global batch."""

    replay_weight: float = 1.0
    """Weight of the cross-entropy, averaged over the replayed tokens of the global batch."""

    mitigation_weight: float = 1.0
    """Weight of KL(reference || model), averaged over the replayed tokens. With 0 no reference model
    is built, unless --max-mitigation-kl or --max-replay-increase needs one."""

    reference_load: str | None = None
    """Checkpoint directory of the frozen reference model. Default: the checkpoint that the run starts from,
    and on resume the reference that the checkpoint recorded."""

    reference_offload: bool = False
    """Keep the reference's weights, except its output layer, in pinned host memory between its forward
    passes. Frees 2 bytes a parameter on the GPU; each step copies them to the GPU once."""

    reference_hidden_offload: bool = False
    """Keep the reference's final hidden states in pinned host memory from its forward pass until the
    loss reads them. Frees, on the last pipeline stage, 2 bytes times the hidden size for each token that
    the rank replays in a step."""

    fp32_logits: bool = False
    """Compute the logits of the unlearning objective in fp32. The rounding noise of bf16 logits hides a KL
    below about 1e-4 and its gradient. Doubles the memory traffic of the head. No effect in fp32 runs."""

    max_mitigation_kl: float | None = None
    """Stop, with a checkpoint and exit code 0, after the first step whose KL(reference || model) is at least
    this, in nats a replayed token."""

    min_forget_probability: float | None = None
    """Stop, with a checkpoint and exit code 0, after the first step whose mean probability of a forgotten
    token is at most this, between 0 and 1."""

    max_replay_increase: float | None = None
    """Stop, with a checkpoint and exit code 0, after the first step whose replay loss is at least this far
    above the reference's on the same tokens, in nats a replayed token. It takes one more product of the
    reference's output layer; --max-mitigation-kl takes none."""

    @property
    def enabled(self) -> bool:
        """Whether this is an unlearning run."""
        return self.forget_data_path is not None or self.forget_per_split

    @property
    def forget_per_split(self) -> bool:
        """Whether the text to forget is named for each split apart."""
        return any(
            path is not None
            for path in (
                self.forget_train_data_path,
                self.forget_valid_data_path,
                self.forget_test_data_path,
            )
        )

    @property
    def needs_reference(self) -> bool:
        """Whether a frozen reference model takes part in the objective, or in what is watched."""
        watched = (self.max_mitigation_kl, self.max_replay_increase) != (None, None)
        return self.enabled and (self.mitigation_weight > 0 or watched)

    def __post_init__(self) -> None:
        """Refuse what no run could use.

        Raises:
            ConfigError: names the flag, what was expected and what was found.
        """
        for name in ("forget_weight", "replay_weight", "mitigation_weight"):
            value = getattr(self, name)
            if not math.isfinite(value) or value < 0:
                raise ConfigError(
                    f"{flag_name(name)}: expected a finite number of at least 0, found {value}"
                )
        if self.forget_batch_size is not None and self.forget_batch_size < 1:
            raise ConfigError(
                f"--forget-batch-size: expected at least 1, found {self.forget_batch_size}"
            )
        self._check_limits()
        if self.forget_data_path is not None and self.forget_per_split:
            raise ConfigError(
                "--forget-data-path: expected either it or --forget-(train|valid|test)-data-path, "
                "found both"
            )
        if self.enabled and not any(
            (self.forget_weight, self.replay_weight, self.mitigation_weight)
        ):
            raise ConfigError(
                "--forget-weight, --replay-weight, --mitigation-weight: expected at least one above 0, "
                "found 0 for all three"
            )

    def _check_limits(self) -> None:
        upper = {"max_mitigation_kl": math.inf, "max_replay_increase": math.inf}
        for name, bound in (upper | {"min_forget_probability": 1.0}).items():
            value, flag = getattr(self, name), flag_name(name)
            if value is None:
                continue
            if not 0 < value < bound:  # nor NaN
                what = "between 0 and 1" if bound == 1 else "above 0"
                raise ConfigError(f"{flag}: expected a finite number {what}, found {value}")

    def forget_samples(self, global_batch_size: int, *, train_global_batch_size: int) -> int:
        """Forgotten samples of a batch whose size may differ from training's (in validation).

        Args:
            global_batch_size: samples of the batch at hand.
            train_global_batch_size: samples of a training batch, to which ``forget_batch_size`` refers.

        Returns:
            The number of samples, in the proportion of training.

        Raises:
            ConfigError: the proportion gives no whole number of samples.
        """
        forget = self.forget_batch_size or train_global_batch_size // 2
        samples, remainder = divmod(forget * global_batch_size, train_global_batch_size)
        if remainder:
            raise ConfigError(
                f"--eval-global-batch-size: expected a size in which {forget} of every "
                f"{train_global_batch_size} samples is a whole number, found {global_batch_size}"
            )
        return samples


@dataclass(kw_only=True)
class ChatConfig:
    """Which conversations a model is tuned on, and for how long."""

    chat_data_path: list[str] | None = field(default=None, metadata=_LIST)
    """JSON lines of conversations (.jsonl, .jsonl.gz, .jsonl.zst). This flag turns chat tuning on: the loss
    covers the assistant's text only. A turn is {"role", "content"} or {"from", "value"}; a
    record is a list of turns, holds one at "messages" or "conversations", or is {"query", "response"}.
    --chat-template names a Jinja file; default: the Hugging Face tokenizer's own, else a plain one."""

    chat_valid_data_path: list[str] | None = field(default=None, metadata=_LIST)
    """Like --chat-data-path, for validation."""

    chat_epochs: int = 2
    """Number of epochs. Sets the number of iterations, unless --train-iters or --train-samples is given; the
    last batch is filled up from one more epoch."""

    @property
    def enabled(self) -> bool:
        """Whether this is a chat tuning run."""
        return self.chat_data_path is not None

    def __post_init__(self) -> None:
        """Refuse what no run could use.

        Raises:
            ConfigError: names the flag, what was expected and what was found.
        """
        if self.chat_epochs < 1:
            raise ConfigError(f"--chat-epochs: expected at least 1, found {self.chat_epochs}")
        if self.chat_valid_data_path is not None and not self.enabled:
            raise ConfigError(
                "--chat-valid-data-path: expected --chat-data-path beside it, found none"
            )


@dataclass(kw_only=True)
class RunConfig:
    """What is logged beside Megatron's own, and what may be written over."""

    overwrite_checkpoints: bool = False
    """Let a run that begins before the latest checkpoint in --save write over those that are there; without
    it such a run is refused, unless it goes on from them."""

    dataset_log_interval: int | None = None
    """Interval, in steps, at which the losses of each dataset of the blends are logged by themselves: means
    over the steps since the last time, and over each validation. TensorBoard and W&B get all of them, the
    console the terms of the objective. Default: off."""

    def __post_init__(self) -> None:
        """Refuse what no run could use.

        Raises:
            ConfigError: names the flag, what was expected and what was found.
        """
        if self.dataset_log_interval is not None and self.dataset_log_interval < 1:
            raise ConfigError(
                f"--dataset-log-interval: expected at least 1, found {self.dataset_log_interval}"
            )
