"""Values that no run can use, alone or together, and places that it cannot write to.

Megatron finds out about most of these when the model is built, at the first save, or by a division by zero;
others end in assertions that name no flag. The plan of a run makes the same checks, without torch.
"""

from __future__ import annotations

import math
import os
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_ext import launched
from megatron_ext.exceptions import ConfigError, flag_name

# The least that each may be. The seeds of the ranks are derived from a positive one.
_AT_LEAST = {
    **{"train_iters": 1, "train_samples": 1, "eval_interval": 1, "eval_iters": 0},
    **{"log_interval": 1, "tensorboard_log_interval": 1, "seed": 1, "num_workers": 0},
    **{"seq_length": 1, "max_position_embeddings": 1, "num_layers": 1, "hidden_size": 1},
    **{"num_attention_heads": 1, "tensor_model_parallel_size": 1, "context_parallel_size": 1},
    **{"pipeline_model_parallel_size": 1, "lr_decay_iters": 1, "lr_decay_samples": 1},
    **{"lr_warmup_iters": 0, "lr_warmup_samples": 0, "micro_batch_size": 1, "global_batch_size": 1},
    **{"eval_micro_batch_size": 1, "eval_global_batch_size": 1, "num_query_groups": 1},
    **{"kv_channels": 1, "ffn_hidden_size": 1},
}


def check_required(args: Namespace, *, supplied: Mapping[str, Any]) -> None:
    """Name the flags that no run can do without; Megatron misses two of them only once the model is built.

    Args:
        args: what was typed.
        supplied: arguments that are set for the user.

    Raises:
        ConfigError: names all that are missing.
    """
    required: list[tuple[str, ...]] = [("micro_batch_size",), ("tokenizer_type",)]
    if not args.use_checkpoint_args:
        required += [(name,) for name in ("num_layers", "hidden_size", "num_attention_heads")]
        required += [("seq_length", "encoder_seq_length"), ("max_position_embeddings",)]
    if not args.skip_train:
        required += [("lr",), ("train_iters", "train_samples")]
    if args.save is not None:
        required += [("save_interval",)]
    found = {**vars(args), **supplied}
    missing = [names for names in required if all(found[name] is None for name in names)]
    if missing:
        flags = (" or ".join(map(flag_name, names)) for names in missing)
        raise ConfigError(f"{', '.join(flags)}: expected a value, found none")


def check_values(args: Namespace) -> None:
    """Refuse numbers that are too small, and directories without a name.

    Args:
        args: what was typed.

    Raises:
        ConfigError: names the flag, what was expected and what was found.
    """
    for name, least in _AT_LEAST.items():
        value = getattr(args, name)
        if value is not None and value < least:
            raise ConfigError(f"{flag_name(name)}: expected at least {least}, found {value}")
    # As of a variable of the shell that is not set; Megatron would save nothing, or load nothing.
    for name in ("save", "load", "pretrained_checkpoint", "reference_load"):
        if getattr(args, name) == "":
            raise ConfigError(f"{flag_name(name)}: expected a directory, found an empty name")


def check_sizes(args: Namespace) -> None:
    """Refuse a model whose sizes do not go together.

    Args:
        args: what was typed; sizes that were not are None.

    Raises:
        ConfigError: names the flags, what was expected and what was found.
    """
    heads, hidden = args.num_attention_heads, args.hidden_size
    if args.kv_channels is None and heads and hidden and hidden % heads:
        raise ConfigError(
            f"--hidden-size: expected a multiple of --num-attention-heads {heads}, or --kv-channels beside "
            f"it, found {hidden}"
        )
    # Without the switch Megatron does not read the number.
    groups = args.num_query_groups if args.group_query_attention else None
    if groups and heads and heads % groups:
        raise ConfigError(
            f"--num-query-groups: expected a divisor of --num-attention-heads {heads}, found {groups}"
        )
    # Megatron's own width is 8/3 of the hidden size, rounded down to a multiple of 64.
    if args.swiglu and args.ffn_hidden_size is None and hidden and hidden < 24:
        raise ConfigError(
            f"--ffn-hidden-size: expected a value beside --swiglu and --hidden-size {hidden}, found none; "
            "Megatron-Core's default would be 0"
        )
    length, longest = args.seq_length, args.max_position_embeddings
    if length and longest and length > longest:
        raise ConfigError(
            f"--seq-length: expected at most --max-position-embeddings {longest}, found {length}"
        )


def check_experts(args: Namespace) -> None:
    """Refuse a mixture of experts that Megatron's layers cannot compute.

    Args:
        args: what was typed.

    Raises:
        ConfigError: names the flags, what was expected and what was found.
    """
    experts, chosen = args.num_experts, args.moe_router_topk
    if not experts:
        if args.expert_model_parallel_size > 1:
            raise ConfigError(
                "--num-experts: expected beside --expert-model-parallel-size "
                f"{args.expert_model_parallel_size}, found none"
            )
        return
    every = args.moe_layer_freq
    if isinstance(every, int) and every < 1:
        raise ConfigError(
            f"--moe-layer-freq: expected a number above 0, or 0 or 1 for each layer, found {every}"
        )
    # More of them end the first step in a traceback, and none at all trains without experts.
    if not 1 <= chosen <= experts:
        raise ConfigError(
            f"--moe-router-topk: expected 1 to --num-experts {experts}, found {chosen}"
        )
    if args.moe_apply_probs_on_input and chosen != 1:
        raise ConfigError(
            f"--moe-router-topk: expected 1 beside --moe-apply-probs-on-input, found {chosen}"
        )
    chunks = getattr(args, "mlp_chunks_for_training", 1)  # no flag of the plan
    if chunks > 1:
        raise ConfigError(
            f"--mlp-chunks-for-training: expected 1 beside --num-experts, found {chunks}; each chunk would "
            "add a whole balancing loss, and count its own tokens only"
        )


def check_training(args: Namespace) -> None:
    """Refuse two precisions or lengths at once, and learning rates that train nothing or end above.

    Args:
        args: what was typed.

    Raises:
        ConfigError: names the flags, what was expected and what was found.
    """
    if args.bf16 and args.fp16:
        raise ConfigError("--bf16, --fp16: expected at most one of them, found both")
    if args.train_iters is not None and args.train_samples is not None and not args.skip_train:
        raise ConfigError("--train-samples: expected either it or --train-iters, found both")
    if args.lr is None:
        return
    if not args.skip_train and not 0 < args.lr < math.inf:  # nor NaN
        raise ConfigError(f"--lr: expected a finite number above 0, found {args.lr}")
    if not 0 <= args.min_lr <= args.lr:
        raise ConfigError(f"--min-lr: expected 0 to --lr {args.lr}, found {args.min_lr}")


def check_places(args: Namespace) -> None:
    """Refuse directories that the run could not write to, hours before it would, or not go on from.

    Args:
        args: what was typed.

    Raises:
        ConfigError: names the flag and what is in the way, on the ranks that look.
    """
    for name in ("save", "tensorboard_dir", "data_cache_path"):
        if not (getattr(args, name) and launched.looks_at_files()):
            continue
        wanted = Path(getattr(args, name)).absolute()
        nearest = next(path for path in (wanted, *wanted.parents) if os.path.lexists(path))
        # A finished cache is only read.
        used = name != "data_cache_path" or nearest != wanted
        if not nearest.is_dir() or (used and not os.access(nearest, os.W_OK | os.X_OK)):
            what = "a directory without permission to write" if nearest.is_dir() else "a file"
            raise ConfigError(
                f"{flag_name(name)} {getattr(args, name)}: expected a directory, there or to be made, to "
                f"write to, found {what} at {nearest}"
            )
    if args.finetune and saves_where_it_loads(args):
        # Slurm and torchrun start a run again, which would begin at iteration 0 with what it saved last.
        raise ConfigError(
            f"--finetune: expected different directories at --load and --save, found {args.save}; a run "
            "that starts at --pretrained-checkpoint goes on from its own --load"
        )


def saves_where_it_loads(args: Namespace) -> bool:
    """Whether ``--load`` and ``--save`` are one directory, whatever their names."""
    return bool(args.load and args.save) and Path(args.load).resolve() == Path(args.save).resolve()


def check_schedule(args: Namespace) -> None:
    """Refuse a warm-up that is not over before the learning rate's schedule is.

    Args:
        args: Megatron's validated arguments.

    Raises:
        ConfigError: names the flag and both lengths.
    """
    if args.skip_train:
        return
    unit = "iters" if args.train_iters else "samples"
    decay = getattr(args, f"lr_decay_{unit}") or getattr(args, f"train_{unit}")
    name, warmup, most = f"lr_warmup_{unit}", getattr(args, f"lr_warmup_{unit}"), decay
    if args.lr_warmup_fraction is not None:
        name, warmup, most = "lr_warmup_fraction", args.lr_warmup_fraction, 1
    if not 0 <= warmup < most:
        raise ConfigError(
            f"{flag_name(name)}: expected at least 0 and less than {most}, for the learning rate's schedule "
            f"has {decay} {'iterations' if unit == 'iters' else unit}, found {warmup}"
        )
    if args.lr_decay_style == "WSD" and getattr(args, f"lr_wsd_decay_{unit}") is None:
        raise ConfigError(
            f"--lr-wsd-decay-{unit}: expected a value with --lr-decay-style WSD, found none"
        )
