"""How a model came about, read from its checkpoint, and the datasets that its run named."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence
from typing import Any

from megatron.core.datasets.utils import get_blend_from_list

from megatron_ext.analysis.samples import describe_dataset
from megatron_ext.checkpoint.inspect import Checkpoint
from megatron_ext.exceptions import DataError, flag_name

# What a reader of a report wants to know of a run, by Megatron's names.
_SETTINGS = (
    *("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups"),
    *("seq_length", "unpadded_vocab_size", "untie_embeddings_and_output_weights"),
    *("train_iters", "global_batch_size", "micro_batch_size", "consumed_train_samples"),
    *("lr", "min_lr", "lr_decay_style", "lr_warmup_iters", "weight_decay", "clip_grad", "seed"),
    *("tensor_model_parallel_size", "pipeline_model_parallel_size", "data_parallel_size"),
    *("bf16", "fp16", "use_distributed_optimizer", "pretrained_checkpoint", "finetune"),
    *("chat_data_path", "tokenizer_digest"),
)
# Of runs that these belong to; their defaults are in the arguments of every run.
_TUNING = ("chat_epochs",)
_UNLEARNING = (
    *("forget_loss", "forget_weight", "replay_weight", "mitigation_weight"),
    *("unlearn_composition", "unlearn_reference"),
)
_SPLITS = ("", "train_", "valid_", "test_")


def record_run(checkpoint: Checkpoint) -> dict[str, Any]:
    """The settings of the run that wrote a checkpoint, and its datasets as they are now.

    Args:
        checkpoint: an opened checkpoint.

    Returns:
        ``settings``, by Megatron's names without what the run did not have, and ``data``: for each flag
        that named datasets their descriptions, or why one cannot be described any more.
    """
    args = checkpoint.args
    forgot = any(getattr(args, f"forget_{split}data_path", None) for split in _SPLITS)
    tuned = getattr(args, "chat_data_path", None)
    names = _SETTINGS + (_TUNING if tuned else ()) + (_UNLEARNING if forgot else ())
    settings = {name: getattr(args, name, None) for name in names}
    return {
        # A weight of 0 is a setting; what was not asked for is none.
        "settings": {k: v for k, v in settings.items() if v is not None and v is not False},
        "data": _datasets(args),
    }


def _datasets(args: Namespace) -> dict[str, list[dict[str, Any]]]:
    found = {}
    for role in ("", "forget_"):
        for split in _SPLITS:
            name = f"{role}{split}data_path"
            typed = getattr(args, name, None)
            if typed:
                found[flag_name(name)] = _describe(typed)
    return found


def _describe(typed: Sequence[str]) -> list[dict[str, Any]]:
    blend = get_blend_from_list(list(typed))
    assert blend is not None
    prefixes, weights = blend
    described = []
    for number, prefix in enumerate(prefixes):
        weight = None if weights is None else weights[number]
        try:
            entry = describe_dataset(prefix)
        except (DataError, OSError) as error:
            # A run's data may have moved since; its model can still be looked at.
            entry = {"prefix": prefix, "missing": str(error)}
        described.append({"weight": weight, **entry})
    return described
