"""Flags that lack another one, or have one beside them with which they do not work.

Megatron would end in assertions, many of them behind the model or at the first step.
"""

from __future__ import annotations

from argparse import Namespace

from megatron_ext.exceptions import ConfigError, flag_name

_PRECISIONS = ("main_grads_dtype", "main_params_dtype", "exp_avg_dtype", "exp_avg_sq_dtype")


def check_company(args: Namespace) -> None:
    """Refuse flags that lack another one, or have it beside them; Megatron would end in an assertion.

    Args:
        args: what was typed.

    Raises:
        ConfigError: names the flags, what was expected and what was found.
    """
    if args.ddp_num_buckets is not None and args.ddp_bucket_size is not None:
        raise ConfigError("--ddp-num-buckets: expected either it or --ddp-bucket-size, found both")
    if args.ddp_average_in_collective and args.calculate_per_token_loss:
        raise ConfigError(
            "--ddp-average-in-collective: expected either it or --calculate-per-token-loss, found both"
        )
    if not args.use_precision_aware_optimizer:
        for name in _PRECISIONS:
            if getattr(args, name) != "fp32":
                raise ConfigError(
                    f"{flag_name(name)}: expected fp32 without --use-precision-aware-optimizer, found "
                    f"{getattr(args, name)}"
                )
    for name in ("save_params_interval", "save_wgrads_interval"):
        if getattr(args, name) is not None and not args.save:
            raise ConfigError(f"{flag_name(name)}: expected --save beside it, found none")


def check_index(args: Namespace) -> None:
    """Refuse an index that is to be found ready, but in no folder or for data that are split by a ratio.

    Args:
        args: what was typed.

    Raises:
        ConfigError: names the flag and what it needs; Megatron would end in assertions, behind the model.
    """
    for name in ("dataloader_fast_cache_load", "dataloader_defer_npy_index_mmap"):
        if getattr(args, name) and args.data_cache_path is None:
            raise ConfigError(
                f"{flag_name(name)}: expected --data-cache-path beside it, found none"
            )
    for name in ("data_path", "data_args_path", "forget_data_path"):
        if args.dataloader_fast_cache_load and getattr(args, name) is not None:
            raise ConfigError(
                "--dataloader-fast-cache-load: expected data named for each split, as by --train-data-path, "
                f"found {flag_name(name)}"
            )


def check_routing(args: Namespace) -> None:
    """Refuse a routing of experts that would end at the first step.

    Args:
        args: what was typed.

    Raises:
        ConfigError: names the flags, what was expected and what was found.
    """
    experts, chosen = args.num_experts, args.moe_router_topk
    if not experts:
        return
    if "quantile_balancing" in args.moe_router_load_balancing_type:
        beside = "beside --moe-router-load-balancing-type quantile_balancing"
        if chosen == experts:  # it needs a best expert that was not chosen
            raise ConfigError(
                f"--moe-router-topk: expected less than --num-experts {experts} {beside}, found {chosen}"
            )
        choices = (args.micro_batch_size or experts) * (args.seq_length or experts) * chosen
        if choices % experts:
            raise ConfigError(
                "--num-experts: expected a divisor of --micro-batch-size x --seq-length x --moe-router-topk "
                f"= {choices} {beside}, found {experts}"
            )
    tensor = args.expert_tensor_parallel_size or args.tensor_model_parallel_size
    spread = args.expert_model_parallel_size * tensor > 1
    flex = args.moe_token_dispatcher_type == "flex"
    if flex and not spread and args.moe_flex_dispatcher_backend != "hybridep":
        raise ConfigError(
            "--moe-token-dispatcher-type: expected alltoall or allgather where experts are on one rank each, "
            "without --expert-model-parallel-size and tensor parallelism, found flex"
        )
