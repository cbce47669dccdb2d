"""Whether a run is of the kind that its checkpoint is of: plain, unlearning or chat tuning."""

from __future__ import annotations

import logging
from argparse import Namespace

from megatron_ext.checkpoint.source import Start
from megatron_ext.config import UnlearnConfig
from megatron_ext.exceptions import ConfigError

logger = logging.getLogger(__name__)

# What the objective is made of; each may change in a run, but not unseen.
_OBJECTIVE = ("forget_loss", "forget_weight", "replay_weight", "mitigation_weight", "fp32_logits")
# Whether attention ends with a document; in every kind of run.
_WITHIN = "dataloader_inter_document_masking"


def check_unlearning(start: Start, composition: dict[str, int]) -> None:
    """The order of the samples follows from the batch sizes; a resumed run must see those that were left.

    Args:
        start: where the run begins.
        composition: by flag, the samples of this run's batches.

    Raises:
        ConfigError: the run goes on from another kind of run, or with other batches.
    """
    if start.before is None:
        return
    recorded = start.recorded("unlearn_composition")
    if recorded is None:
        raise ConfigError(
            f"--load {start.before.directory}: expected the checkpoint of an unlearning run to "
            "resume, found one of another kind; to start unlearning from its weights, name it with "
            "--pretrained-checkpoint, or add --finetune"
        )
    for flag, found in composition.items():
        expected = recorded.get(flag, found)
        if expected != found:
            raise ConfigError(
                f"{flag}: expected {expected} samples, with which {start.before.directory} was started, "
                f"found {found}"
            )


def check_plain(start: Start, args: Namespace) -> None:
    """Where the flags of unlearning or of tuning were left out, the rest of the run would be another one.

    Args:
        start: where the run begins.
        args: Megatron's validated arguments, of plain training.

    Raises:
        ConfigError: the run goes on from another kind of run.
    """
    if start.before is None or args.skip_train or args.ckpt_convert_format is not None:
        return
    kinds = {
        "an unlearning run (--forget-data-path)": start.recorded("unlearn_composition"),
        "chat tuning (--chat-data-path)": start.recorded("chat_digest"),
    }
    for kind, mark in kinds.items():
        if mark is not None:
            raise ConfigError(
                f"--load {start.before.directory}: expected the checkpoint of plain training to resume, "
                f"found one of {kind}; to start plain training from its weights, name it with "
                "--pretrained-checkpoint, or add --finetune"
            )


def tell_changes(start: Start, args: Namespace, config: UnlearnConfig) -> None:
    """Say which part of the objective is another one from here on.

    Args:
        start: where the run begins.
        args: Megatron's validated arguments.
        config: the settings of unlearning.
    """
    if start.checkpoint is None or args.rank != 0:
        return
    names = _OBJECTIVE if config.enabled and start.resumed else ()
    # Of an imported model, which has iteration 0, this is not known; and conversations are often kept apart
    # where documents were not.
    if start.resumed or (args.chat_digest is None and start.checkpoint.iteration):
        names = *names, _WITHIN
    for name in names:
        found = getattr(args, name)
        before = getattr(start.checkpoint.args, name, found)
        if before != found:
            logger.warning(
                "--%s: %s until iteration %d, %s from here on",
                *(name.replace("_", "-"), before, start.checkpoint.iteration, found),
            )
