"""Whether optimizer and schedule of a checkpoint fit the run that would go on with them.

Megatron finds out while it loads, after the model is built, and ends every rank with a traceback: a bare
``KeyError``, an assertion that names no flag, or the advice to save with a flag that is on anyway.
"""

from __future__ import annotations

from argparse import Namespace
from typing import Any

from megatron_ext.buckets import default_bucket
from megatron_ext.checkpoint.inspect import Checkpoint
from megatron_ext.exceptions import ConfigError, flag_name

# By the scheduler's own name, the flag that a value follows from. Those with None are lengths, in samples.
_SCHEDULE = {
    "max_lr": "--lr",
    "min_lr": "--min-lr",
    "lr_decay_style": "--lr-decay-style",
    "lr_warmup_steps": None,
    "lr_decay_steps": None,
    "start_wd": "--weight-decay",
    "end_wd": "--weight-decay",
    "wd_incr_style": "--weight-decay-incr-style",
    "wd_incr_steps": None,
}
# What decides which parameters lie where in the buffers of the distributed optimizer, and the flag where it
# has another name. Another order of equal length would be loaded without a word: Transformer Engine's layers
# hold the norms' weights elsewhere than the torch-native ones.
_BUFFER = {
    "tensor_model_parallel_size": None,
    "pipeline_model_parallel_size": None,
    "expert_model_parallel_size": None,
    "expert_tensor_parallel_size": None,
    "virtual_pipeline_model_parallel_size": "--num-virtual-stages-per-pipeline-rank",
    "pipeline_model_parallel_layout": None,
    "decoder_first_pipeline_num_layers": None,
    "decoder_last_pipeline_num_layers": None,
    "account_for_embedding_in_pipeline_split": None,
    "account_for_loss_in_pipeline_split": None,
    "transformer_impl": None,
    "spec": None,
    "moe_grouped_gemm": None,
}
# Kept in the optimizer's state, which wins over the flags without a word.
_SETTINGS = {"sgd": ("sgd_momentum",), "adam": ("adam_beta1", "adam_beta2", "adam_eps")}
_ANEW = "--no-load-optim starts optimizer and learning rate schedule anew"
BUCKETS = "distributed optimizer was saved without --dist-ckpt-optim-fully-reshardable"
WAYS_OUT = (
    "resume once with the old settings and that flag and save, or use --no-load-optim, which starts "
    "optimizer and learning rate schedule anew"
)


def check_resumable(checkpoint: Checkpoint, args: Namespace) -> None:
    """Refuse what Megatron's optimizer or schedule could not go on from.

    Args:
        checkpoint: the run's own checkpoint, at ``--load`` and without ``--finetune``.
        args: Megatron's validated arguments of this run.

    Raises:
        ConfigError: names the flag and the ways out.
    """
    saved = checkpoint.args
    # Each data-parallel rank has random numbers of its own then, or all have the same.
    apart, own = (getattr(a, "data_parallel_random_init", False) for a in (saved, args))
    if own and not apart:
        raise ConfigError(
            f"--data-parallel-random-init: expected a run without it, as that of {checkpoint.path}, found it"
        )
    if checkpoint.path.name == "release":
        return
    lacking = [
        part
        for part in ("optim", "rng")
        if getattr(saved, f"no_save_{part}", False) and not getattr(args, f"no_load_{part}")
    ]
    if lacking:
        loads, saves = (
            "".join(f" --no-{verb}-{part}" for part in lacking) for verb in ("load", "save")
        )
        raise ConfigError(
            f"--load: expected{loads} beside it, for {checkpoint.path} was saved with{saves}, found a run "
            f"without; {_ANEW}; --finetune starts a new run from the weights"
        )
    if apart and not own and not args.no_load_rng:
        raise ConfigError(
            f"--data-parallel-random-init: expected it, as in the run of {checkpoint.path}, or "
            "--no-load-rng, found neither"
        )
    if args.no_load_optim:
        return
    _check_settings(checkpoint, args)
    _check_distributed_optimizer(checkpoint, args)
    skips = args.override_opt_param_scheduler or args.use_checkpoint_opt_param_scheduler
    if checkpoint.schedule is not None and not skips:
        _check_schedule(checkpoint, args)
    elif checkpoint.schedule is not None and getattr(args, "decoupled_lr", None) is not None:
        # Megatron tells these weights from the others by their rates alone.
        for name in ("max_lr", "min_lr"):
            expected, found = checkpoint.schedule.get(name), schedule_of(args)[name]
            if expected != found:
                raise ConfigError(
                    f"{_SCHEDULE[name]}: expected {expected} beside --decoupled-lr, as in {checkpoint.path}, "
                    f"found {found}; {_ANEW}"
                )


def keep_buckets(checkpoint: Checkpoint, args: Namespace) -> None:
    """Lay the gradients out in buckets of the size that the checkpoint's optimizer was saved in.

    Megatron makes them larger with more than 40 data-parallel ranks, and a run that went on with other nodes
    could not load its optimizer.

    Args:
        checkpoint: the run's own checkpoint, at ``--load`` and without ``--finetune``.
        args: Megatron's validated arguments of this run; the size is set unless the user has given one.
    """
    saved = checkpoint.args
    sharded = getattr(saved, "use_distributed_optimizer", False)
    if not sharded or getattr(saved, "dist_ckpt_optim_fully_reshardable", True):
        return
    typed = (args.ddp_bucket_size, args.ddp_num_buckets, getattr(saved, "ddp_num_buckets", None))
    if args.no_load_optim or not saved.overlap_grad_reduce or any(typed):
        return
    ranks = saved.data_parallel_size * saved.context_parallel_size
    args.ddp_bucket_size = saved.ddp_bucket_size or default_bucket(ranks)


def _check_settings(checkpoint: Checkpoint, args: Namespace) -> None:
    saved = checkpoint.args
    # The weights of a decoupled learning rate are groups of their own, which no schedule's flag adds.
    names = ("optimizer", *_SETTINGS.get(args.optimizer, ()), "decoupled_lr", "decoupled_min_lr")
    for name in names:
        found = getattr(args, name, None)
        expected = getattr(saved, name, found)
        if expected != found:
            raise ConfigError(
                f"{flag_name(name)}: expected {expected}, as in {checkpoint.path}, found {found}; "
                f"{_ANEW}"
            )
    _check_experts(checkpoint, args)
    halves = [any(getattr(a, name, False) for name in ("bf16", "fp16")) for a in (saved, args)]
    if halves[0] != halves[1] and not args.use_distributed_optimizer:
        raise ConfigError(
            f"--bf16, --fp16: expected {'one of them' if halves[0] else 'neither'}, as in {checkpoint.path}, "
            f"whose optimizer keeps other tensors in fp32 runs, found {'neither' if halves[0] else 'one'}; "
            f"{_ANEW}"
        )


def _check_experts(checkpoint: Checkpoint, args: Namespace) -> None:
    there, here = (_spread_apart(a) for a in (checkpoint.args, args))
    if there != here:
        expected, found = ("otherwise than" if apart else "as" for apart in (there, here))
        raise ConfigError(
            "--expert-model-parallel-size, --expert-tensor-parallel-size: expected experts that are spread "
            f"{expected} the other weights, as in {checkpoint.path}, found them spread {found} these; those "
            f"that are spread otherwise have an optimizer of their own in Megatron; {_ANEW}"
        )


def _spread_apart(args: Namespace) -> bool:
    """Whether there are experts, on other ranks than a dense layer's parts would be."""
    tensor = getattr(args, "tensor_model_parallel_size", 1)
    own = getattr(args, "expert_tensor_parallel_size", None) or tensor
    apart = getattr(args, "expert_model_parallel_size", 1) > 1 or own != tensor
    return bool(getattr(args, "num_experts", None)) and apart


def _check_distributed_optimizer(checkpoint: Checkpoint, args: Namespace) -> None:
    saved = checkpoint.args
    distributed = getattr(saved, "use_distributed_optimizer", args.use_distributed_optimizer)
    if distributed != args.use_distributed_optimizer:
        here, there = (
            ("with it", "without") if args.use_distributed_optimizer else ("without it", "with")
        )
        raise ConfigError(
            f"--use-distributed-optimizer: expected as in {checkpoint.path}, which was saved {there}, found "
            f"a run {here}; {_ANEW}"
        )
    if not distributed or getattr(saved, "dist_ckpt_optim_fully_reshardable", True):
        return
    for name, flag in _BUFFER.items():
        if name == "moe_grouped_gemm" and args.transformer_impl == "local":
            continue  # these layers have the same parameters with it and without
        found = getattr(args, name, None)
        expected = getattr(saved, name, found)  # an older Megatron may not know the flag
        if str(expected) != str(found):
            flag = flag or flag_name(name)
            raise ConfigError(
                f"{flag}: expected {expected}, as in {checkpoint.path}, whose {BUCKETS}, found {found}; "
                f"{WAYS_OUT}"
            )


def _check_schedule(checkpoint: Checkpoint, args: Namespace) -> None:
    saved = checkpoint.schedule
    assert saved is not None
    differing = {n: v for n, v in schedule_of(args).items() if saved.get(n, v) != v}
    if args.lr_warmup_fraction is not None and "lr_decay_steps" in differing:
        differing.pop("lr_warmup_steps", None)  # a part of that
    epochs = [getattr(a, "chat_epochs", None) for a in (checkpoint.args, args)]
    for name, found in differing.items():
        expected, flag = saved[name], _SCHEDULE[name]
        if flag is None and args.chat_digest is not None and epochs[0] != epochs[1]:
            flag, (expected, found) = "--chat-epochs", epochs
        if flag is None:
            flag = _length_flag(name, args)
            expected, found = (f"{steps:g} samples" for steps in (expected, found))
        raise ConfigError(
            f"{flag}: expected {expected}, the schedule of {checkpoint.path}, found {found}; "
            "--override-opt-param-scheduler goes on with the schedule of this run's flags, "
            "--use-checkpoint-opt-param-scheduler with that of the checkpoint"
        )


def schedule_of(args: Namespace) -> dict[str, Any]:
    """What Megatron's ``get_optimizer_param_scheduler`` makes of the flags, by the scheduler's names."""
    if args.train_iters:
        batch = args.global_batch_size
        decay = (args.lr_decay_iters or args.train_iters) * batch
        warmup, total = args.lr_warmup_iters * batch, args.train_iters * batch
    else:
        decay = args.lr_decay_samples or args.train_samples
        warmup, total = args.lr_warmup_samples, args.train_samples
    if args.lr_warmup_fraction is not None:
        warmup = args.lr_warmup_fraction * decay
    return {
        "max_lr": args.lr,
        "min_lr": args.min_lr,
        "lr_warmup_steps": warmup,
        "lr_decay_steps": decay,
        "lr_decay_style": args.lr_decay_style,
        "start_wd": args.start_weight_decay,
        "end_wd": args.end_weight_decay,
        "wd_incr_style": args.weight_decay_incr_style,
        "wd_incr_steps": total,
    }


def _length_flag(name: str, args: Namespace) -> str:
    unit = "iters" if args.train_iters else "samples"
    if name == "lr_warmup_steps" and args.lr_warmup_fraction is not None:
        return "--lr-warmup-fraction"
    given = {"lr_warmup_steps": "lr_warmup", "lr_decay_steps": "lr_decay"}.get(name, "train")
    if not getattr(args, f"{given}_{unit}"):
        given = "train"
    flag = flag_name(f"{given}_{unit}")
    return f"{flag} x --global-batch-size" if args.train_iters else flag
