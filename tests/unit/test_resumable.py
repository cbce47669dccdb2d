"""A run that cannot go on from a checkpoint's optimizer or schedule is refused by the flag's name."""

from argparse import Namespace
from pathlib import Path

import pytest

from megatron_ext.checkpoint.inspect import Checkpoint
from megatron_ext.checkpoint.resumable import check_resumable, keep_buckets, schedule_of
from megatron_ext.exceptions import ConfigError

RUN = {
    "optimizer": "adam",
    "adam_beta1": 0.9,
    "adam_beta2": 0.999,
    "adam_eps": 1e-8,
    "sgd_momentum": 0.9,
    "decoupled_lr": None,
    "no_load_optim": False,
    "no_load_rng": False,
    "override_opt_param_scheduler": False,
    "use_checkpoint_opt_param_scheduler": False,
    "use_distributed_optimizer": True,
    "dist_ckpt_optim_fully_reshardable": False,
    "tensor_model_parallel_size": 2,
    "pipeline_model_parallel_size": 1,
    "virtual_pipeline_model_parallel_size": None,
    "transformer_impl": "local",
    "train_iters": 6,
    "train_samples": None,
    "global_batch_size": 16,
    "lr": 1e-4,
    "min_lr": 0.0,
    "lr_decay_style": "cosine",
    "lr_decay_iters": None,
    "lr_decay_samples": None,
    "lr_warmup_iters": 0,
    "lr_warmup_samples": 0,
    "lr_warmup_fraction": None,
    "start_weight_decay": 0.01,
    "end_weight_decay": 0.01,
    "weight_decay_incr_style": "constant",
    "chat_digest": None,
    "chat_epochs": 2,
}
EXPERTS = {"num_experts": 4, "expert_model_parallel_size": 1, "expert_tensor_parallel_size": None}
RESHARDABLE = {"dist_ckpt_optim_fully_reshardable": True}
SAMPLES = {"train_iters": None, "train_samples": 96}


def check(now, saved=None, folder="iter_0000005"):
    saved = Namespace(**RUN | (saved or {}))
    checkpoint = Checkpoint(Path("ckpt"), 5, Path("ckpt") / folder, saved, schedule_of(saved))
    check_resumable(checkpoint, Namespace(**RUN | now))


def test_random_numbers_of_each_replica_stay_so():
    flag, apart = "--data-parallel-random-init", {"data_parallel_random_init": True}
    check(apart, apart)
    check({"no_load_rng": True}, apart)
    with pytest.raises(ConfigError, match=f"^{flag}: expected it, .* found neither$"):
        check({}, apart)
    for now in (apart, apart | {"no_load_rng": True}):
        with pytest.raises(ConfigError, match=f"^{flag}: expected a run without it, .* found it$"):
            check(now)
        with pytest.raises(ConfigError, match=f"^{flag}: expected a run without it, .* found it$"):
            check(now, folder="release")


@pytest.mark.parametrize(
    ("now", "saved"),
    [
        ({}, {}),
        # Lengths count in samples, as the scheduler does.
        ({"train_iters": 3, "global_batch_size": 32}, {}),
        (SAMPLES, {}),
        ({"lr_warmup_fraction": 0.5}, {"lr_warmup_iters": 3}),
        ({"train_iters": 8, "override_opt_param_scheduler": True}, {}),
        ({"train_iters": 8, "use_checkpoint_opt_param_scheduler": True}, {}),
        ({"train_iters": 8, "no_load_optim": True, "use_distributed_optimizer": False}, {}),
        ({"train_iters": 8, "no_load_optim": True, "adam_eps": 1e-5}, {"no_save_optim": True}),
        ({"no_load_rng": True}, {"no_save_rng": True}),
        ({"sgd_momentum": 0.8}, {}),  # Adam has none
        ({"moe_grouped_gemm": True}, {"moe_grouped_gemm": False}),  # in torch-native layers
        ({"bf16": True}, {"fp16": True}),
        # One optimizer of their own there and here, if the buffers are not compared.
        (
            EXPERTS | {"expert_model_parallel_size": 2} | RESHARDABLE,
            EXPERTS | {"expert_tensor_parallel_size": 1} | RESHARDABLE,
        ),
        (EXPERTS | {"expert_tensor_parallel_size": 2}, EXPERTS | RESHARDABLE),
        ({"expert_tensor_parallel_size": 1}, {"expert_tensor_parallel_size": 2} | RESHARDABLE),
        ({"account_for_loss_in_pipeline_split": False}, {}),  # saved before there was that flag
        (
            {"tensor_model_parallel_size": 1, "transformer_impl": "transformer_engine"},
            {"dist_ckpt_optim_fully_reshardable": True},
        ),
        (
            {"tensor_model_parallel_size": 1, "use_distributed_optimizer": False},
            {"use_distributed_optimizer": False},
        ),
    ],
)
def test_what_megatron_goes_on_with_passes(now, saved):
    check(now, saved)


def test_a_release_has_no_optimizer_to_go_on_with():
    check({"train_iters": 8, "use_distributed_optimizer": False}, folder="release")


@pytest.mark.parametrize(
    ("now", "saved", "message"),
    [
        (
            {"train_iters": 8},
            {},
            "--train-iters x --global-batch-size: expected 96 samples, .*iter_0000005, found 128 samples; "
            "--override-opt-param-scheduler goes on",
        ),
        (
            {"train_iters": 8, "lr_decay_iters": 8},
            {},
            "--lr-decay-iters x --global-batch-size: expected 96",
        ),
        # The decay is the same, but Megatron's weight decay counts up to the end of the run.
        (
            {"train_iters": 8, "lr_decay_iters": 6},
            {},
            "--train-iters x --global-batch-size: expected 96",
        ),
        ({"train_samples": 97, "train_iters": None}, SAMPLES, "--train-samples: expected 96"),
        ({"lr_warmup_iters": 1}, {}, "--lr-warmup-iters x .*: expected 0 samples, .*found 16"),
        ({"lr_warmup_fraction": 0.5}, {}, "--lr-warmup-fraction: expected 0 samples, .*found 48"),
        ({"lr": 2e-4}, {}, "--lr: expected 0.0001, .* found 0.0002"),
        ({"lr_decay_style": "constant"}, {}, "--lr-decay-style: expected cosine, .*found constant"),
        ({"end_weight_decay": 0.1}, {}, "--weight-decay: expected 0.01, .*found 0.1"),
        (
            {"use_distributed_optimizer": False},
            {},
            "--use-distributed-optimizer: expected .*saved with, found a run without it; --no-load-optim",
        ),
        (
            {},
            {"use_distributed_optimizer": False},
            "--use-distributed-optimizer: expected .*saved without, found a run with it",
        ),
        (
            {"tensor_model_parallel_size": 1},
            {},
            "--tensor-model-parallel-size: expected 2, .* --dist-ckpt-optim-fully-reshardable, found 1",
        ),
        ({"pipeline_model_parallel_size": 2}, {}, "--pipeline-model-parallel-size: expected 1,"),
        ({"optimizer": "muon"}, {}, "--optimizer: expected adam, .*found muon; --no-load-optim"),
        # These Megatron takes from the checkpoint whatever the flags say.
        ({"adam_beta2": 0.95}, {}, "--adam-beta2: expected 0.999, .*found 0.95; --no-load-optim"),
        ({"adam_eps": 1e-5}, {}, "--adam-eps: expected 1e-08, .*found 1e-05"),
        (
            {"optimizer": "sgd", "sgd_momentum": 0.5},
            {"optimizer": "sgd"},
            "--sgd-momentum: expected 0.9",
        ),
        ({"decoupled_lr": 1e-3}, {}, "--decoupled-lr: expected None, .*found 0.001"),
        (
            {"bf16": True, "use_distributed_optimizer": False},
            {"use_distributed_optimizer": False},
            "--bf16, --fp16: expected neither, .* found one; --no-load-optim",
        ),
        (
            {"use_distributed_optimizer": False},
            {"fp16": True, "use_distributed_optimizer": False},
            "--bf16, --fp16: expected one of them, .* found neither",
        ),
        (
            {"decoupled_lr": 1e-3, "lr": 2e-4, "override_opt_param_scheduler": True},
            {"decoupled_lr": 1e-3},
            "--lr: expected 0.0001 beside --decoupled-lr, .*found 0.0002; --no-load-optim",
        ),
        (
            {},
            {"no_save_optim": True},
            "--load: expected --no-load-optim beside it, .* --no-save-optim",
        ),
        (
            {},
            {"no_save_rng": True},
            "--load: expected --no-load-rng beside it, .* --no-save-rng, found",
        ),
        (
            {},
            {"no_save_optim": True, "no_save_rng": True},
            "--load: expected --no-load-optim --no-load-rng beside it, .* --finetune starts a new run",
        ),
        # The number of epochs is what the user typed.
        (
            {"train_iters": 12, "chat_epochs": 4, "chat_digest": "ab"},
            {"chat_digest": "ab"},
            "--chat-epochs: expected 2, the schedule of .*iter_0000005, found 4; --override-opt",
        ),
        (
            {"train_iters": 12, "lr_warmup_fraction": 0.5},
            {"lr_warmup_fraction": 0.5},
            "--train-iters x --global-batch-size: expected 96 samples, .* found 192 samples",
        ),
        (
            {"transformer_impl": "transformer_engine", "moe_grouped_gemm": True},
            {"transformer_impl": "transformer_engine", "moe_grouped_gemm": False},
            "--moe-grouped-gemm: expected False, .* found True",
        ),
        (
            {"virtual_pipeline_model_parallel_size": 2},
            {},
            "--num-virtual-stages-per-pipeline-rank: expected None, .* found 2",
        ),
        # Their norms lie elsewhere in buffers of the same length.
        (
            {"transformer_impl": "transformer_engine"},
            {},
            "--transformer-impl: expected local, .* found transformer_engine; "
            "resume once with the old settings",
        ),
        (
            EXPERTS,
            EXPERTS | {"expert_model_parallel_size": 2},
            "--expert-model-parallel-size, --expert-tensor.*: expected .* otherwise than .*iter_0000005, "
            "found them spread as these; .* --no-load-optim",
        ),
        # RUN has a TP of 2.
        (
            EXPERTS | {"expert_tensor_parallel_size": 1},
            EXPERTS,
            "--expert-model-parallel-size, --expert-tensor-parallel-size: expected .* spread as the other",
        ),
    ],
)
def test_what_megatron_would_fail_on_is_refused(now, saved, message):
    with pytest.raises(ConfigError, match=message):
        check(now, saved)


BUCKETS = {
    **{"overlap_grad_reduce": True, "ddp_bucket_size": None, "ddp_num_buckets": None},
    **{"data_parallel_size": 64, "context_parallel_size": 1},
}


@pytest.mark.parametrize(
    ("now", "saved", "size"),
    [
        ({}, {}, 64_000_000),
        ({}, {"data_parallel_size": 32}, 40_000_000),
        ({}, {"context_parallel_size": 2}, 128_000_000),
        ({}, {"ddp_bucket_size": 5000}, 5000),
        # Where the user says something else, or nothing depends on it, Megatron's own rule holds.
        ({"ddp_bucket_size": 7}, {}, 7),
        ({"ddp_num_buckets": 3}, {}, None),
        ({}, {"ddp_num_buckets": 3}, None),
        ({}, {"overlap_grad_reduce": False}, None),
        ({}, {"dist_ckpt_optim_fully_reshardable": True}, None),
        ({}, {"use_distributed_optimizer": False}, None),
        ({"no_load_optim": True}, {}, None),
    ],
)
def test_buckets_keep_the_size_in_which_the_optimizer_was_saved(now, saved, size):
    args = Namespace(**RUN | BUCKETS | {"data_parallel_size": 8} | now)
    checkpoint = Checkpoint(
        Path("ckpt"), 5, Path("ckpt") / "iter_0000005", Namespace(**RUN | BUCKETS | saved)
    )
    keep_buckets(checkpoint, args)
    assert args.ddp_bucket_size == size


def test_that_size_is_megatrons(monkeypatch):
    from megatron.core.distributed import DistributedDataParallelConfig
    from megatron.training import training

    monkeypatch.setattr(training, "get_pg_size", lambda ranks: ranks)
    for ranks in (8, 64):
        args = Namespace(**RUN | BUCKETS)
        saved = Namespace(**RUN | BUCKETS | {"data_parallel_size": ranks})
        keep_buckets(Checkpoint(Path("c"), 5, Path("c") / "iter_0000005", saved), args)
        config = DistributedDataParallelConfig(overlap_grad_reduce=True)
        expected = training.resolve_ddp_bucket_size(config, ranks, True, 10**9)
        assert args.ddp_bucket_size == expected
