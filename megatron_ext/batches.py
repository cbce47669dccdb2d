"""Whether the batches of training and validation fit what runs them; looked at before anything starts.

Megatron finds out when it runs the first of them: at the first validation, a thousand steps into a run.
"""

from __future__ import annotations

from argparse import Namespace

from megatron_ext.config import UnlearnConfig
from megatron_ext.exceptions import ConfigError


def check_batches(args: Namespace, config: UnlearnConfig) -> None:
    """Check what depends on sizes that Megatron has derived.

    Args:
        args: Megatron's validated arguments.
        config: the settings of unlearning.

    Raises:
        ConfigError: names the flag, what was expected and what was found.
    """
    if not args.skip_train:
        _check_length(args)
        _check_interleaved(
            args, args.global_batch_size, args.micro_batch_size, "--global-batch-size"
        )
    evaluated = args.eval_global_batch_size, args.eval_micro_batch_size
    if args.eval_iters:
        _check_interleaved(args, *evaluated, "--eval-global-batch-size")
    if config.enabled:
        trained = args.global_batch_size, args.micro_batch_size
        _check_composition(args, config, *trained, "--forget-batch-size")
        _check_composition(args, config, *evaluated, "--eval-global-batch-size")


def _check_length(args: Namespace) -> None:
    """A run without a single step would end as a success."""
    samples, batch = args.train_samples, args.global_batch_size
    if samples is not None and args.step_batch_size_schedule is None and samples < batch:
        raise ConfigError(
            f"--train-samples: expected at least the {batch} of one step, found {samples}"
        )


def _check_interleaved(args: Namespace, batch: int, micro: int, flag: str) -> None:
    """The interleaved schedule takes groups of at least as many microbatches as there are stages."""
    if args.virtual_pipeline_model_parallel_size is None or args.step_batch_size_schedule:
        return
    stages = args.pipeline_model_parallel_size
    group = args.microbatch_group_size_per_vp_stage or stages
    microbatches = batch // (micro * args.data_parallel_size)
    if microbatches < group or 0 < microbatches % group < stages:
        raise ConfigError(
            f"{flag}: expected, for the interleaved schedule, at least {group} microbatches in groups of "
            f"{group}, the last one of at least {stages}, found {microbatches} ({batch} samples, micro-batch "
            f"size {micro} x data-parallel size {args.data_parallel_size})"
        )


def _check_composition(
    args: Namespace, config: UnlearnConfig, batch: int, micro: int, flag: str
) -> None:
    """A microbatch is forgotten or replayed as a whole, and on all data-parallel ranks alike."""
    forget = config.forget_samples(batch, train_global_batch_size=args.global_batch_size)
    unit = micro * args.data_parallel_size
    if not 0 < forget < batch:
        raise ConfigError(
            f"{flag}: expected at least 1 and fewer than the global batch of {batch} samples to be "
            f"forgotten, found {forget}"
        )
    if forget % unit:
        raise ConfigError(
            f"{flag}: expected a multiple of {unit} forgotten samples (micro-batch size {micro} x "
            f"data-parallel size {args.data_parallel_size}), found {forget} of {batch}"
        )
