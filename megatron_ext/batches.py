"""Whether ranks and batches divide, and fit what runs them; looked at before anything starts.

Megatron finds out when it runs the first of them: at the first validation, a thousand steps into a run.
The plan of a run makes the same checks, without torch.
"""

from __future__ import annotations

import math
from argparse import Namespace
from collections.abc import Mapping

from megatron_ext.config import UnlearnConfig
from megatron_ext.exceptions import ConfigError, flag_name

_RANKS = "ranks (torchrun's --nnodes x --nproc-per-node)"
_PARALLEL = ("tensor_model", "context", "pipeline_model")


def check_layout(args: Namespace) -> None:
    """Check that ranks and batches divide, before Megatron does in terms that nobody typed.

    Args:
        args: what was typed, and the number of ranks.

    Raises:
        ConfigError: names the flags, what was expected and what was found.
    """
    sizes = check_copies(args)
    if args.num_experts:
        check_expert_ranks(
            args.num_experts,
            args.world_size,
            sizes=sizes | {"expert_model": args.expert_model_parallel_size},
            expert_tensor=args.expert_tensor_parallel_size,
            sequence_parallel=args.sequence_parallel,
            named=_RANKS,
        )
    micro, batch = args.micro_batch_size, args.global_batch_size
    if micro is None:
        return
    data_parallel = args.world_size // math.prod(sizes.values())
    if batch is not None and not args.decrease_batch_size_if_needed:
        check_batch_size(batch, micro=micro, data_parallel=data_parallel)
    evaluated, part = args.eval_global_batch_size, args.eval_micro_batch_size
    if evaluated is None and part is None:
        return
    check_batch_size(
        evaluated or batch or micro * data_parallel,
        micro=part or micro,
        data_parallel=data_parallel,
        flag="--eval-global-batch-size",
        of=f"--{'micro' if part is None else 'eval-micro'}-batch-size",
    )


def check_copies(args: Namespace) -> dict[str, int]:
    """Check that copies of the model fill the ranks that were started.

    Args:
        args: what was typed, and the number of ranks.

    Returns:
        By the start of its flag, the size of each kind of model parallelism.

    Raises:
        ConfigError: names the flags and what starts ranks.
    """
    sizes = {name: getattr(args, f"{name}_parallel_size") for name in _PARALLEL}
    check_ranks(args.world_size, sizes, named=_RANKS)
    return sizes


def check_ranks(ranks: int, sizes: Mapping[str, int], *, named: str) -> None:
    """Check that copies of the model fill the ranks.

    Args:
        ranks: of the run.
        sizes: by the start of its flag, the size of each kind of model parallelism.
        named: what the user calls the ranks.

    Raises:
        ConfigError: they do not.
    """
    product = math.prod(sizes.values())
    if ranks % product:
        flags = (
            f"{flag_name(f'{name}_parallel_size')} {size}"
            for name, size in sizes.items()
            if size > 1
        )
        raise ConfigError(
            f"{named}: expected a multiple of {product} ({' x '.join(flags)}), found {ranks}"
        )


def check_expert_ranks(
    experts: int,
    ranks: int,
    *,
    sizes: Mapping[str, int],
    expert_tensor: int | None,
    sequence_parallel: bool,
    named: str,
) -> None:
    """Check that a layer's experts can be spread over the ranks.

    Args:
        experts: of a layer.
        ranks: of the run.
        sizes: by the start of its flag, the size of each kind of model parallelism.
        expert_tensor: `--expert-tensor-parallel-size`, None where that of the rest is taken.
        sequence_parallel: whether `--sequence-parallel` is there.
        named: what the user calls the ranks.

    Raises:
        ConfigError: they cannot.
    """
    tensor, groups = sizes["tensor_model"], sizes["expert_model"]
    if experts % groups:
        raise ConfigError(
            f"--num-experts: expected a multiple of --expert-model-parallel-size {groups}, found {experts}"
        )
    own = {"tensor_model": tensor} if expert_tensor is None else {"expert_tensor": expert_tensor}
    own |= {"expert_model": groups, "pipeline_model": sizes["pipeline_model"]}
    check_ranks(ranks, own, named=named)
    if tensor > 1 and not sequence_parallel:
        # Megatron's layers of experts say so in their first step, in a traceback.
        raise ConfigError(
            f"--sequence-parallel: expected it beside --num-experts {experts} with "
            f"--tensor-model-parallel-size {tensor}, found none"
        )


def check_batch_size(
    batch: int,
    *,
    micro: int,
    data_parallel: int,
    flag: str = "--global-batch-size",
    of: str = "--micro-batch-size",
) -> None:
    """Check that microbatches of all data-parallel ranks make up a global batch.

    Args:
        batch: samples of the global batch.
        micro: samples of a microbatch.
        data_parallel: copies of the model.
        flag: that names the global batch.
        of: the flag that names the microbatch.

    Raises:
        ConfigError: they do not.
    """
    if batch % (micro * data_parallel):
        raise ConfigError(
            f"{flag}: expected a multiple of {micro * data_parallel} ({of} {micro} x data-parallel size "
            f"{data_parallel}), found {batch}"
        )


def check_batches(args: Namespace, config: UnlearnConfig) -> None:
    """Check what depends on sizes that Megatron has derived.

    Args:
        args: Megatron's validated arguments.
        config: the settings of unlearning.

    Raises:
        ConfigError: names the flag, what was expected and what was found.
    """
    if not args.skip_train:
        check_length(args)
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
        _check_scales(args)


def _check_scales(args: Namespace) -> None:
    """With fp8's delayed scaling, a scale of the gradients must know those of every kind of text.

    Those of forgotten text are smaller by orders of magnitude, and a scale that was taken from them cuts off
    those of the replayed microbatch that comes next: by the defaults a step lost a fifth of its gradient.
    """
    if not args.fp8 or args.fp8_recipe != "delayed" or args.skip_train:
        return
    passes = args.global_batch_size // (args.micro_batch_size * args.data_parallel_size)
    passes *= (
        args.virtual_pipeline_model_parallel_size or 1
    )  # each adds to the history of all chunks
    length, rule = args.fp8_amax_history_len, args.fp8_amax_compute_algo
    if length < passes or rule != "max":
        raise ConfigError(
            "--fp8-amax-history-len, --fp8-amax-compute-algo: expected for unlearning at least "
            f"{passes}, the passes of a step, and max, or another --fp8-recipe than delayed; "
            f"found {length} and {rule}, by which scales for the gradients of forgotten text would cut off "
            "those of replayed text"
        )


def check_length(args: Namespace) -> None:
    """A run without a single step would end as a success.

    Raises:
        ConfigError: fewer samples than a step takes.
    """
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
