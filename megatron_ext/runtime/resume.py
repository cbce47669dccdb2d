"""What Megatron's loop needs so that a run which was killed loses nothing and goes on exactly."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import CheckpointException

from megatron_ext.checkpoint import safe_load
from megatron_ext.data.atomic import free_mib
from megatron_ext.exceptions import CheckpointError
from megatron_ext.runtime import loaders, packed, schedule
from megatron_ext.values import saves_where_it_loads

logger = logging.getLogger(__name__)


def apply() -> None:
    """Apply all of the following and what checkpoints need; called once before training."""
    packed.apply()
    prepare_loads()
    verify_what_can_be()
    schedule.enable()
    complete_saves()
    prepare_saves()
    measure_buckets()
    leave_enough_samples()
    loaders.prepare()


def prepare_loads() -> None:
    """Wrap the load of Megatron's loop.

    Layers keep the extra states that a checkpoint lacks. Those that `complete_saves` has added are asked for
    where ``--dist-ckpt-strictness`` would refuse what nobody asks for, and dropped. And a load that fails
    because the gradients lie in other buckets says so: the distributed optimizer's state is saved bucket by
    bucket unless it is asked to be reshardable.
    """
    from megatron.core.dist_checkpointing.serialization import load_sharded_metadata
    from megatron.training import checkpointing

    from megatron_ext.checkpoint.extra_state import add_empty, keep_own
    from megatron_ext.checkpoint.resumable import BUCKETS, WAYS_OUT

    load = checkpointing._load_global_dist_base_checkpoint

    def load_or_explain(
        load_dir: str,
        args: Any,
        rank0: bool,
        sharded_state_dict: dict[str, Any] | None,
        iteration: int,
        release: bool,
        **more: Any,
    ) -> Any:
        added: list[tuple[str, str]] = []
        try:
            if not rank0 and sharded_state_dict is not None:
                path = checkpointing.get_checkpoint_name(
                    load_dir, iteration, release, return_base_dir=True
                )
                present = load_sharded_metadata(path)
                keep_own(sharded_state_dict, present)
                if args.dist_ckpt_strictness != "assume_ok_unexpected":
                    added = add_empty(sharded_state_dict, present=present)
            state, *rest = load(
                load_dir, args, rank0, sharded_state_dict, iteration, release, **more
            )
        # torch's error is no Exception.
        except (Exception, CheckpointException) as error:
            if ".bucket_idx_" not in str(error):
                raise
            raise CheckpointError(
                f"--load {load_dir}: its {BUCKETS}, and in other buckets than this run's, which follow from "
                "--overlap-grad-reduce, --ddp-bucket-size, --ddp-num-buckets and the precisions of weights "
                f"and gradients; {WAYS_OUT}"
            ) from error

        for part, name in added:
            del state[part][name]
        return state, *rest

    checkpointing._load_global_dist_base_checkpoint = load_or_explain


def verify_what_can_be() -> None:
    """Let ``--verify-integrity`` name what is damaged, and start where a checkpoint was saved without it.

    Hashes are written with a checkpoint only where the flag is there already. Megatron ends in a traceback
    where they are missing, so no run could be started with it from any other model.
    """
    from megatron.core.dist_checkpointing import serialization
    from megatron.core.dist_checkpointing.core import CheckpointingException

    verify = serialization.verify_integrity_manifest

    def verify_or_tell(checkpoint_dir: str) -> None:
        try:
            verify(checkpoint_dir)
        except CheckpointingException as error:  # the same on every rank
            if "manifest not found" not in str(error):
                raise CheckpointError(f"--verify-integrity: {error}") from error
            if not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0:
                logger.warning(
                    "--verify-integrity: %s was saved without this flag and is not verified",
                    checkpoint_dir,
                )

    serialization.verify_integrity_manifest = verify_or_tell


def complete_saves() -> None:
    """Save the empty extra states that stock Megatron with Transformer Engine would miss."""
    from megatron.core import dist_checkpointing

    from megatron_ext.checkpoint.extra_state import add_empty

    save = dist_checkpointing.save

    def save_with_empty(sharded_state_dict: dict[str, Any], *more: Any, **named: Any) -> Any:
        add_empty(sharded_state_dict)
        return save(sharded_state_dict, *more, **named)

    dist_checkpointing.save = save_with_empty


def prepare_saves() -> None:
    """Wrap ``save_checkpoint`` of Megatron's loop.

    TensorBoard's writer keeps what is logged in memory for two minutes: a run that is killed after a
    checkpoint and goes on from it would never log those steps again. And a folder that an earlier run
    left unfinished, or that is written again after a broken checkpoint, must not look complete while new
    tensors replace the old. A run that is started again at its end does not write what it has just loaded:
    Megatron would, and a full disk would then cost the result. A run that is not alone in its folder ends
    before it mixes its tensors with another's. A save that fails names its folder and the room on its disk.
    """
    import megatron.training.training as loop

    from megatron_ext.checkpoint.complete import MARKS
    from megatron_ext.checkpoint.inspect import folder_name
    from megatron_ext.runtime.one_writer import OneWriter

    save, setup, writers = loop.save_checkpoint, loop.setup_model_and_optimizer, OneWriter()

    def set_up_after_looking(*args: Any, **kwargs: Any) -> Any:
        options = loop.get_args()
        if options.save and options.rank == 0:
            writers.begin(options.save)
        return setup(*args, **kwargs)

    def save_after_preparing(iteration: int, *args: Any, **kwargs: Any) -> Any:
        options = loop.get_args()
        if writer := loop.get_tensorboard_writer():
            writer.flush()
        if iteration == options.iteration > 0 and saves_where_it_loads(options):
            loop.print_rank_0(
                f"iteration {iteration} is in {options.save} already: not saved again"
            )
            return None
        if options.save and options.rank == 0:
            writers.claim(options.save, iteration)
            # Rank 0 alone writes these files, after all ranks have written their tensors.
            for mark in MARKS:
                (Path(options.save) / folder_name(iteration) / mark).unlink(missing_ok=True)
        try:
            return save(iteration, *args, **kwargs)
        # torch's error is no Exception.
        except (Exception, CheckpointException) as error:
            # torch tells of a full disk as "unexpected pos 704 vs 598".
            free = free_mib(options.save) if options.save else 0.0
            raise CheckpointError(
                f"--save {options.save}: the checkpoint of iteration {iteration} could not be written, with "
                f"{free:.1f} MiB free on its disk: {safe_load.reason(error)}"
            ) from error

    loop.setup_model_and_optimizer = set_up_after_looking
    loop.save_checkpoint = save_after_preparing


def measure_buckets() -> None:
    """Let a bucket of the distributed optimizer end with its last parameter where its state is saved.

    The bucket before a tied embedding under pipeline parallelism ends where the embedding would start, on a
    multiple of 64; Megatron then fills up to the next multiple of 128, beyond the size that it gives the
    bucket, and no checkpoint could be saved.
    """
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    describe = DistributedOptimizer.sharded_param_state_dp_reshardable

    def describe_measured(self: DistributedOptimizer, *args: Any, **more: Any) -> Any:
        for buffer in self.buffers:
            for bucket in buffer.buckets:
                ends = [buffer.param_index_map[parameter][1] for parameter in bucket.params]
                end = max(ends) - bucket.offset
                # Where nothing is filled up, checkpoints with the larger size exist.
                if bucket.numel_unpadded < bucket.grad_data.numel():
                    bucket.numel_unpadded = end
        return describe(self, *args, **more)

    DistributedOptimizer.sharded_param_state_dp_reshardable = describe_measured


def leave_enough_samples() -> None:
    """Ask the data sets for what a run has read and what it has still to read.

    Megatron counts as if the run had had the flags of today from its start. After a change of
    ``--eval-interval``, ``--eval-iters`` or ``--global-batch-size`` the samples could end before the run
    does, at a validation days later. It also forgets one validation if ``--start-eval-at-iter`` is a
    multiple of the interval. And it asks for training samples where nothing is trained, though there need
    be no number of iterations then.
    """
    import megatron.training.training as loop

    count = loop.get_train_valid_test_num_samples

    def count_what_is_left() -> tuple[int, int, int]:
        args = loop.get_args()
        if args.skip_train:
            args.train_iters = args.train_iters or 0
            return (0, *count()[1:])
        train, valid, test = count()
        # A batch size that grows, or a run in phases, is counted in its own way.
        if args.step_batch_size_schedule is None and not args.phase_transition_iterations:
            left = max(0, args.train_iters - args.iteration) * args.global_batch_size
            train = max(train, args.consumed_train_samples + left)
        if args.eval_iters:
            done = max(args.iteration, (args.start_eval_at_iter or 0) - 1)
            evaluations = max(
                0, args.train_iters // args.eval_interval - done // args.eval_interval
            )
            left = (evaluations + 1) * args.eval_iters * args.eval_global_batch_size
            valid = max(valid, args.consumed_valid_samples + left)
        return train, valid, test

    loop.get_train_valid_test_num_samples = count_what_is_left
