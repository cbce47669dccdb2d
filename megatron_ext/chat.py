"""Chat tuning in Megatron's loop: the flags' checks, the number of iterations, the datasets.

The step is that of plain training with another loss mask. How many tokens count differs widely between
microbatches there, and Megatron by default takes the mean over microbatches and ranks of each one's mean,
which weighs a token by how few others count beside it. Chat tuning therefore runs with
``--calculate-per-token-loss``: gradients are sums over the global batch, divided by its counted tokens. What
that does to the balancing losses of experts is mended in balancing.py.
"""

from __future__ import annotations

import hashlib
import logging
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron.core.datasets.utils import Split

from megatron_ext.chat_refusals import REQUIRED_WITH_CHAT, WITH_CHAT
from megatron_ext.config import ChatConfig
from megatron_ext.data.atomic import free_mib, replace_file
from megatron_ext.data.chat_dataset import ChatDataset, Packing
from megatron_ext.data.chat_template import TEMPLATE_FILE, ChatTemplate, is_built_in, load_template
from megatron_ext.data.chat_tokens import load_tokens
from megatron_ext.data.providers import Datasets, reads_data
from megatron_ext.data.tokenizers import TokenizerSpec, tokenizer_digest
from megatron_ext.exceptions import ConfigError, DataError, flag_name
from megatron_ext.refusals import refuse

if TYPE_CHECKING:
    from megatron_ext.checkpoint.inspect import Checkpoint

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ChatRun:
    """A chat tuning run: its data are tokenised and packed.

    Attributes:
        config: the flags.
        template: the chat template.
        train: packed conversations.
        valid: those of validation.
        iterations: computed from the epochs, or ``None`` if the command line says how long to train.
    """

    config: ChatConfig
    template: ChatTemplate
    train: Packing
    valid: Packing | None
    iterations: int | None

    @property
    def defaults(self) -> dict[str, Any]:
        """Megatron's arguments that the run sets; those that the user types win."""
        # The loss is the mean over the counted tokens of the global batch.
        values: dict[str, Any] = {"calculate_per_token_loss": True}
        if self.iterations is not None:
            values["train_iters"] = self.iterations
        if self.valid is None:
            values["eval_iters"] = 0
        return values

    @property
    def digest(self) -> str:
        """Of all that the content and order of the samples depend on."""
        parts = (self.train.tokens.digest, self.train.seq_length, self.train.seed)
        return hashlib.sha256(repr(parts).encode()).hexdigest()

    def describe(self) -> str:
        """What the run tunes on, in words."""
        length = "as --train-iters or --train-samples says"
        if self.iterations is not None:
            length = f"{self.config.chat_epochs} epochs in {self.iterations:,} iterations"
        lines = [
            f"chat: {self.train.tokens.describe()}; {self.train.sequences(1):,} sequences an epoch, "
            f"{self.train.fill:.1%} full; {length}"
        ]
        if self.valid is not None:
            lines.append(f"chat validation: {self.valid.tokens.describe()}")
        return "\n".join(lines)

    def record(self, args: Namespace) -> None:
        """Keep template and data in the arguments, and so in every checkpoint.

        Raises:
            ConfigError: validation was asked for and there is nothing to validate on.
        """
        if self.valid is None and args.eval_iters:
            raise ConfigError(
                f"--eval-iters: expected --chat-valid-data-path beside it or 0, found {args.eval_iters}"
            )
        args.tuned_chat_template = self.template.source
        args.chat_digest = self.digest

    def provider(self, args: Namespace) -> Callable[..., Datasets]:
        """The provider that Megatron's ``pretrain`` calls for its datasets."""

        def provide(num_samples: Sequence[int], vp_stage: int | None = None) -> Datasets:
            if not reads_data(args, vp_stage):
                return None, None, None
            splits = zip(
                num_samples, (self.train, self.valid), (Split.train, Split.valid), strict=False
            )
            train, valid = (
                None
                if packing is None or not count
                else ChatDataset(
                    packing,
                    samples=count,
                    eod=self.template.eod_id,
                    split=split,
                    apart=args.dataloader_inter_document_masking,
                )
                for count, packing, split in splits
            )
            return train, valid, None

        provide.is_distributed = True  # type: ignore[attr-defined]  # read by Megatron's loop
        return provide


def chat_run(args: Namespace, config: ChatConfig) -> ChatRun:
    """Check the flags, tokenise and pack, before Megatron validates the rest.

    Args:
        args: parsed arguments.
        config: the settings of chat tuning.

    Raises:
        ConfigError: a flag or a combination that cannot work.
        DataError: a file cannot be read, or its records are no conversations.
    """
    _check(args)
    spec = TokenizerSpec(
        tokenizer_type=args.tokenizer_type,
        tokenizer_model=args.tokenizer_model,
        use_fast=not args.tokenizer_hf_no_use_fast,
        trust_remote_code=args.trust_remote_code,
    )
    template = load_template(spec, path=args.chat_template)
    template.check_tuning()

    def packing(flag: str, files: list[str]) -> Packing:
        if missing := [file for file in files if not Path(file).is_file()]:
            raise ConfigError(f"{flag}: expected a file, found none at {missing[0]}")
        tokens = load_tokens(
            [Path(file) for file in files],
            template,
            limit=args.seq_length + 1,
            tokenizer_digest=tokenizer_digest(spec),
            cache=None if args.data_cache_path is None else Path(args.data_cache_path),
        )
        return Packing(tokens, seq_length=args.seq_length, seed=args.seed)

    assert config.chat_data_path is not None
    train = packing("--chat-data-path", config.chat_data_path)
    valid = None
    if config.chat_valid_data_path is not None:
        valid = packing("--chat-valid-data-path", config.chat_valid_data_path)
    iterations = None
    if args.train_iters is None and args.train_samples is None:
        iterations = -(-train.sequences(config.chat_epochs) // args.global_batch_size)
    return ChatRun(config, template, train, valid, iterations)


def warn_of_template(start: Checkpoint, args: Namespace) -> None:
    """Say that the model was tuned with another template before, where this run was given none.

    Args:
        start: the checkpoint whose weights the run starts from.
        args: those of this run.
    """
    recorded = getattr(start.args, "tuned_chat_template", None)
    if recorded in (None, args.tuned_chat_template) or args.chat_template is not None or args.rank:
        return
    taken = "the built-in one" if is_built_in(args.tuned_chat_template) else "the tokenizer's own"
    place = start.directory / TEMPLATE_FILE
    file = place if place.is_file() else "FILE"
    logger.warning(
        "--chat-template: expected the template with which %s was tuned, found none given: this run tunes "
        "with %s, which is another; --chat-template %s keeps the former",
        *(start.path, taken, file),
    )


def write_template(args: Namespace) -> None:
    """Put the template of the model's tuning beside the run's checkpoints, where inference looks for it.

    Raises:
        DataError: it cannot be written.
    """
    if args.save is None or args.tuned_chat_template is None:
        return
    path = Path(args.save) / TEMPLATE_FILE
    try:
        replace_file(path, args.tuned_chat_template.encode())
    except OSError as error:
        free = free_mib(path.parent)
        raise DataError(
            f"{path} cannot be written, with {free:.1f} MiB free on its disk: {error}"
        ) from error


def check_resume(saved: Namespace, args: Namespace) -> None:
    """Refuse to go on with other data, or to take another kind of run for the start of this one.

    Args:
        saved: arguments of the checkpoint at ``--load``.
        args: those of this run, without ``--finetune``.

    Raises:
        ConfigError: says what to do.
    """
    found = getattr(saved, "chat_digest", None)
    if found is None:
        raise ConfigError(
            f"--load {args.load}: expected the checkpoint of a chat tuning run to resume, found one of "
            "another kind, whose iterations would count as done; add --finetune to start from its weights"
        )
    if saved.global_batch_size != args.global_batch_size:
        # Iterations are counted from the start, as if all had had the batch of today.
        raise ConfigError(
            f"--global-batch-size: expected {saved.global_batch_size}, with which {args.load} was started, "
            f"because the number of iterations depends on it; found {args.global_batch_size}"
        )
    if found != args.chat_digest:
        raise ConfigError(
            f"--chat-data-path: expected the conversations, template, tokenizer, --seq-length and --seed "
            f"with which {args.load} was started (digest {found[:12]}), found others "
            f"({args.chat_digest[:12]})"
        )


def _check(args: Namespace) -> None:
    refuse(args, WITH_CHAT, where="cannot be combined with --chat-data-path")
    for name in REQUIRED_WITH_CHAT:
        if getattr(args, name) is None:
            raise ConfigError(f"{flag_name(name)}: expected it beside --chat-data-path, found none")
