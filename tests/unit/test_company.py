"""Flags that lack another one, or have one beside them with which they do not work."""

from argparse import Namespace

import pytest

from megatron_ext.company import check_company, check_index, check_routing
from megatron_ext.data.checks import _check_sequences
from megatron_ext.exceptions import ConfigError


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, None),
        ({"ddp_num_buckets": 2}, None),
        (
            {"ddp_num_buckets": 2, "ddp_bucket_size": 1000},
            "--ddp-num-buckets: .* --ddp-bucket-size",
        ),
        (
            {"ddp_average_in_collective": True, "calculate_per_token_loss": True},
            "--ddp-average-in-collective: .* --calculate-per-token-loss",
        ),
        ({"ddp_average_in_collective": True}, None),
        ({"save_params_interval": 2, "save": "runs"}, None),
        ({"save_params_interval": 2}, "--save-params-interval: expected --save"),
        ({"save_wgrads_interval": 2}, "--save-wgrads-interval: expected --save"),
        ({"main_grads_dtype": "bf16", "use_precision_aware_optimizer": True}, None),
        (
            {"main_grads_dtype": "bf16"},
            "--main-grads-dtype: expected fp32 without --use-precision-aware-optimizer, found bf16$",
        ),
        ({"exp_avg_sq_dtype": "fp8"}, "--exp-avg-sq-dtype: expected fp32 without .*, found fp8$"),
    ],
)
def test_flags_that_need_others_or_exclude_them(changes, message):
    names = ("ddp_num_buckets", "ddp_bucket_size", "save_params_interval", "save_wgrads_interval")
    names += ("ddp_average_in_collective", "calculate_per_token_loss", "save")
    names += ("use_precision_aware_optimizer",)
    kinds = ("main_grads_dtype", "main_params_dtype", "exp_avg_dtype", "exp_avg_sq_dtype")
    args = Namespace(**dict.fromkeys(names) | dict.fromkeys(kinds, "fp32") | changes)
    if message is None:
        check_company(args)
        return
    with pytest.raises(ConfigError, match=f"^{message}"):
        check_company(args)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data_cache_path": None}, "--dataloader-fast-cache-load: expected --data-cache-path"),
        ({"data_path": ["a"]}, "--dataloader-fast-cache-load: .* each split, .* found --data-path"),
        ({"forget_data_path": ["a"]}, "--dataloader-fast-cache-load: .* found --forget-data-path"),
        (
            {"dataloader_fast_cache_load": False, "data_cache_path": None},
            "--dataloader-defer-npy-index-mmap: expected --data-cache-path",
        ),
    ],
)
def test_an_index_that_is_to_be_there_needs_a_folder_and_data_of_each_split(changes, message):
    flags = {"dataloader_fast_cache_load": True, "dataloader_defer_npy_index_mmap": True}
    flags |= {"data_cache_path": "cache", "data_path": None, "data_args_path": None}
    flags |= {"forget_data_path": None}
    check_index(Namespace(**flags))
    with pytest.raises(ConfigError, match=message):
        check_index(Namespace(**flags | changes))


ROUTING = {
    **{"num_experts": 4, "moe_router_topk": 2, "moe_router_load_balancing_type": "aux_loss"},
    **{"micro_batch_size": 1, "seq_length": 6, "moe_token_dispatcher_type": "alltoall"},
    **{"moe_flex_dispatcher_backend": "deepep", "expert_model_parallel_size": 1},
    **{"expert_tensor_parallel_size": None, "tensor_model_parallel_size": 1},
}
QUANTILE = {"moe_router_load_balancing_type": ["quantile_balancing"]}
FLEX = {"moe_token_dispatcher_type": "flex"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, None),
        (QUANTILE, None),
        ({"moe_router_topk": 4}, None),
        (
            QUANTILE | {"moe_router_topk": 4},
            "--moe-router-topk: expected less than --num-experts 4 .*quantile_balancing, found 4$",
        ),
        (QUANTILE | {"num_experts": None, "moe_router_topk": 4}, None),
        (
            QUANTILE | {"seq_length": 5},
            "--num-experts: expected a divisor of .* = 10 beside .* found 4$",
        ),
        (QUANTILE | {"seq_length": 5, "micro_batch_size": 2}, None),
        ({"seq_length": 5}, None),
        (FLEX, "--moe-token-dispatcher-type: expected alltoall or allgather where .* found flex$"),
        (FLEX | {"moe_flex_dispatcher_backend": "ncclep"}, "--moe-token-dispatcher-type: "),
        (FLEX | {"moe_flex_dispatcher_backend": "hybridep"}, None),
        (FLEX | {"expert_model_parallel_size": 2}, None),
        (FLEX | {"tensor_model_parallel_size": 2}, None),
        (
            FLEX | {"tensor_model_parallel_size": 2, "expert_tensor_parallel_size": 1},
            "--moe-token-dispatcher-type: ",
        ),
        (FLEX | {"num_experts": None}, None),
    ],
)
def test_routings_that_would_end_at_the_first_step(changes, message):
    args = Namespace(**ROUTING | changes)
    if message is None:
        check_routing(args)
        return
    with pytest.raises(ConfigError, match=f"^{message}"):
        check_routing(args)


def test_numbers_of_sequences_that_are_none(tmp_path):
    path = tmp_path / "sequences.json"
    for text, found in (
        (None, "No such file"),
        ("{", "Expecting"),
        ('{"a": 1.5}', "something else"),
    ):
        if text is not None:
            path.write_text(text)
        with pytest.raises(ConfigError, match=f"^--per-dataset-sequences-path: .*{found}"):
            _check_sequences(Namespace(per_dataset_sequences_path=str(path)))
    path.write_text('{"a": 1}')
    _check_sequences(Namespace(per_dataset_sequences_path=str(path)))
    _check_sequences(Namespace(per_dataset_sequences_path=None))
