"""The fp32 weights of the precision-aware optimizer, kept whole.

With `--use-precision-aware-optimizer` the fp32 weights of a bf16 model belong to Transformer Engine's
optimizer. By default it keeps only the 16 bits of each that its bf16 weight lacks, and Megatron-Core 0.19.2
saves these as if they were the weights. With `--dist-ckpt-optim-fully-reshardable` no run can load such a
checkpoint; without it one that leaves the optimizer's flag out goes on from the bits, without a word, and its
loss explodes. Kept whole they cost 2 bytes a parameter more, divided by the data-parallel ranks, and their
checkpoints are those of the plain optimizer.
"""

from __future__ import annotations

from argparse import Namespace

import torch

from megatron_ext.checkpoint.inspect import Checkpoint
from megatron_ext.exceptions import ConfigError

_RECORD = "store_param_remainders"  # Megatron reads its optimizer's settings among the arguments


def keep_whole(args: Namespace, before: Checkpoint | None) -> None:
    """Have the optimizer keep whole fp32 weights, unless it goes on from a checkpoint of the bits.

    Args:
        args: Megatron's validated arguments of this run; the setting is added, and recorded with them in its
            checkpoints.
        before: the run's own checkpoint, at ``--load`` and without ``--finetune``, if it goes on from one.

    Raises:
        ConfigError: the checkpoint holds the bits, and this run could not go on from them.
    """
    args.store_param_remainders = False
    if before is None or args.no_load_optim or not _has_remainders(before.args):
        return
    fully = "dist_ckpt_optim_fully_reshardable"
    anew = "--no-load-optim starts optimizer and learning rate schedule anew"
    kept = f"the optimizer of {before.path} kept only the bits that bf16 weights lack of fp32 ones"
    if getattr(before.args, fully, False):
        raise ConfigError(
            f"--load: expected a checkpoint with fp32 weights, found none: {kept}, and Megatron-Core saved "
            f"them as fp32 numbers; {anew}"
        )
    if not args.use_precision_aware_optimizer:
        raise ConfigError(
            f"--use-precision-aware-optimizer: expected it, for {kept}, found a run without it; {anew}"
        )
    if getattr(args, fully):
        raise ConfigError(
            f"--dist-ckpt-optim-fully-reshardable: expected a run without it, for {kept}, which no run could "
            f"load from its own checkpoints, found it; {anew}"
        )
    args.store_param_remainders = True


def _has_remainders(saved: Namespace) -> bool:
    """Whether the optimizer of a checkpoint kept the bits; Megatron does not record it, these runs do."""
    aware = getattr(saved, "use_precision_aware_optimizer", False) and saved.bf16
    if not aware or saved.main_params_dtype is not torch.float32:
        return False
    return getattr(saved, _RECORD, not saved.optimizer_cpu_offload)
