"""Values that no run can use and places that it cannot write to, each named before anything starts."""

from argparse import Namespace

import pytest

from megatron_ext.exceptions import ConfigError
from megatron_ext.values import (
    check_experts,
    check_places,
    check_schedule,
    check_sizes,
    check_training,
    check_values,
)

NUMBERS = {
    **{"train_iters": 10, "train_samples": None, "eval_interval": 1000, "eval_iters": 0},
    **{"log_interval": 1, "tensorboard_log_interval": 1, "seed": 1234, "num_workers": 0},
    **{"seq_length": None, "max_position_embeddings": 8, "num_layers": 2, "hidden_size": 8},
    **{"num_attention_heads": 2, "tensor_model_parallel_size": 1, "context_parallel_size": 1},
    **{"pipeline_model_parallel_size": 1, "lr_decay_iters": None, "lr_decay_samples": None},
    **{"lr_warmup_iters": 0, "lr_warmup_samples": 0, "micro_batch_size": 2, "global_batch_size": 8},
    **{"eval_micro_batch_size": None, "eval_global_batch_size": None, "num_query_groups": None},
    **{"kv_channels": None, "ffn_hidden_size": None},
    **{"save": None, "load": "a", "pretrained_checkpoint": None, "reference_load": None},
}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train_iters": 0}, "--train-iters: expected at least 1, found 0"),
        ({"eval_iters": -1}, "--eval-iters: expected at least 0, found -1"),
        ({"seed": -1}, "--seed: expected at least 1, found -1"),
        ({"micro_batch_size": 0}, "--micro-batch-size: expected at least 1, found 0"),
        ({"kv_channels": 0}, "--kv-channels: expected at least 1, found 0"),
        ({"save": ""}, "--save: expected a directory, found an empty name"),
        ({"load": ""}, "--load: expected a directory, found an empty name"),
    ],
)
def test_values_that_no_run_can_use(changes, message):
    check_values(Namespace(**NUMBERS))
    with pytest.raises(ConfigError, match=f"^{message}$"):
        check_values(Namespace(**(NUMBERS | changes)))


SIZES = {
    **{"hidden_size": 8, "num_attention_heads": 4, "kv_channels": None, "num_query_groups": 3},
    **{"group_query_attention": False, "seq_length": 16, "max_position_embeddings": 16},
    **{"swiglu": False, "ffn_hidden_size": None},
}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, None),
        ({"hidden_size": 10}, "--hidden-size: .* --num-attention-heads 4, .* found 10"),
        ({"hidden_size": 10, "kv_channels": 2}, None),
        (
            {"hidden_size": None, "max_position_embeddings": None},
            None,
        ),  # missing ones: see elsewhere
        (
            {"group_query_attention": True},
            "--num-query-groups: .* --num-attention-heads 4, found 3",
        ),
        ({"seq_length": 17}, "--seq-length: .* --max-position-embeddings 16, found 17"),
        (
            {"swiglu": True},
            "--ffn-hidden-size: .* --swiglu and --hidden-size 8, found none; .* would be 0",
        ),
        ({"swiglu": True, "ffn_hidden_size": 16}, None),
        ({"swiglu": True, "hidden_size": 24}, None),
    ],
)
def test_a_model_whose_sizes_do_not_go_together(changes, message):
    _holds(check_sizes, SIZES | changes, message)


EXPERTS = {
    **{"num_experts": 4, "moe_router_topk": 2, "expert_model_parallel_size": 1},
    **{"moe_apply_probs_on_input": False, "moe_layer_freq": 1},
}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, None),
        ({"moe_router_topk": 4}, None),
        ({"moe_router_topk": 5}, "--moe-router-topk: expected 1 to --num-experts 4, found 5"),
        ({"moe_router_topk": 0}, "--moe-router-topk: expected 1 to --num-experts 4, found 0"),
        (
            {"moe_apply_probs_on_input": True},
            "--moe-router-topk: expected 1 beside --moe-apply-probs-on-input, found 2",
        ),
        ({"moe_apply_probs_on_input": True, "moe_router_topk": 1}, None),
        ({"num_experts": None, "moe_router_topk": 9}, None),
        ({"moe_layer_freq": 0}, "--moe-layer-freq: expected a number above 0, .* found 0"),
        ({"moe_layer_freq": [0, 1]}, None),
        ({"moe_layer_freq": 0, "num_experts": None}, None),
        (
            {"mlp_chunks_for_training": 2},
            "--mlp-chunks-for-training: expected 1 beside --num-experts, found 2; each chunk would add",
        ),
        ({"mlp_chunks_for_training": 1}, None),
        ({"mlp_chunks_for_training": 2, "num_experts": None}, None),
        (
            {"num_experts": None, "expert_model_parallel_size": 2},
            "--num-experts: expected beside --expert-model-parallel-size 2, found none",
        ),
    ],
)
def test_experts_that_no_layer_could_have(changes, message):
    _holds(check_experts, EXPERTS | changes, message)


NUMERICS = {
    **{"bf16": True, "fp16": False, "lr": 1e-3, "min_lr": 0.0, "skip_train": False},
    **{"train_iters": 10, "train_samples": None},
}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, None),
        ({"fp16": True}, "--bf16, --fp16: .* found both$"),
        ({"lr": 0.0}, "--lr: .* above 0, found 0.0"),
        ({"lr": -1e-3}, "--lr: .* above 0, found -0.001"),
        ({"lr": float("nan")}, "--lr: .* above 0, found nan"),
        ({"lr": 0.0, "skip_train": True}, None),
        ({"lr": None, "min_lr": 1.0}, None),
        ({"min_lr": 2e-3}, "--min-lr: expected 0 to --lr 0.001, found 0.002"),
        ({"min_lr": 1e-3}, None),
        ({"train_samples": 80}, "--train-samples: .* --train-iters, found both"),
        ({"train_samples": 80, "train_iters": None}, None),
    ],
)
def test_precisions_lengths_and_rates_that_no_run_can_use(changes, message):
    _holds(check_training, NUMERICS | changes, message)


def places(**changes):
    unset = {"save": None, "tensorboard_dir": "", "data_cache_path": None, "load": None}
    return Namespace(**(unset | {"finetune": False} | changes))


@pytest.mark.parametrize("flag", ["save", "tensorboard_dir", "data_cache_path"])
def test_a_file_in_the_way(tmp_path, flag):
    (tmp_path / "file").touch()
    (tmp_path / "dangling").symlink_to("nowhere")
    check_places(places(**{flag: tmp_path / "to" / "be" / "made"}))
    for bad in ("file", "file/below", "dangling"):
        with pytest.raises(ConfigError, match=f"^--{flag.replace('_', '-')} .* a file at "):
            check_places(places(**{flag: tmp_path / bad}))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dangling", "file"]  # nothing made


def test_a_directory_without_permission(tmp_path, monkeypatch):
    monkeypatch.setattr("os.access", lambda path, mode: False)  # root may write everywhere
    check_places(places(data_cache_path=tmp_path))  # a finished cache is only read
    for bad in ({"save": tmp_path}, {"data_cache_path": tmp_path / "new"}):
        with pytest.raises(ConfigError, match=f"without permission to write at {tmp_path}$"):
            check_places(places(**bad))


def test_a_run_that_would_begin_anew_at_every_start(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path)
    with pytest.raises(
        ConfigError,
        match=r"^--finetune: expected different directories at --load and --save, found .*link;",
    ):
        check_places(places(load=tmp_path, save=tmp_path / "link", finetune=True))
    check_places(places(load=tmp_path, save=tmp_path / "link"))
    check_places(places(load=tmp_path, save=tmp_path / "other", finetune=True))
    check_places(places(load=tmp_path, finetune=True))


SCHEDULE = {
    **{"skip_train": False, "train_iters": 10, "train_samples": None, "lr_warmup_fraction": None},
    **{"lr_decay_iters": None, "lr_decay_samples": None, "lr_decay_style": "cosine"},
    **{"lr_warmup_iters": 9, "lr_warmup_samples": 0},
    **{"lr_wsd_decay_iters": None, "lr_wsd_decay_samples": None},
}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, None),
        ({"lr_warmup_iters": 10}, "--lr-warmup-iters: .* less than 10, .* 10 iterations, found 10"),
        ({"lr_warmup_iters": 10, "lr_decay_iters": 11}, None),
        ({"lr_warmup_iters": 10, "skip_train": True}, None),
        (
            {"train_iters": None, "train_samples": 32, "lr_warmup_samples": 32},
            "--lr-warmup-samples: .* 32 samples, found 32",
        ),
        ({"lr_warmup_fraction": 1.0}, "--lr-warmup-fraction: .* less than 1, .*found 1.0"),
        ({"lr_warmup_fraction": float("nan")}, "--lr-warmup-fraction: .*found nan"),
        ({"lr_decay_style": "WSD"}, "--lr-wsd-decay-iters: .*found none"),
        ({"lr_decay_style": "WSD", "lr_wsd_decay_iters": 3}, None),
    ],
)
def test_a_warm_up_that_the_schedule_has_no_room_for(changes, message):
    _holds(check_schedule, SCHEDULE | changes, message)


def _holds(check, values, message):
    """A check passes, or refuses with this message."""
    if message is None:
        check(Namespace(**values))
        return
    with pytest.raises(ConfigError, match=f"^{message}"):
        check(Namespace(**values))


@pytest.mark.parametrize(("given", "rows"), [(None, 500), (512, 512)])
def test_a_vocabulary_that_is_not_padded_has_the_rows_of_the_tokenizer(monkeypatch, given, rows):
    """Megatron leaves the number out with --no-pad-vocab-size."""
    from megatron_ext import arguments

    monkeypatch.setattr(arguments, "get_tokenizer", lambda: Namespace(vocab_size=500))
    args = Namespace(padded_vocab_size=given, tokenizer_type="NullTokenizer")
    arguments.record_tokenizer(args)
    assert (args.padded_vocab_size, args.unpadded_vocab_size) == (rows, 500)


@pytest.mark.parametrize("from_checkpoint", [True, False])
def test_a_models_sizes_are_checked_wherever_they_come_from(from_checkpoint, monkeypatch):
    from megatron_ext import arguments as module

    for name in vars(module).copy():
        if name.startswith("check_") and name not in ("check_sizes", "check_experts"):
            monkeypatch.setattr(module, name, lambda *_, **__: None)
    for name in ("unlearn_config", "_config", "record_tokenizer"):
        monkeypatch.setattr(module, name, lambda *_: Namespace(enabled=False))
    monkeypatch.setattr(module.compat, "leave_transformers_out", lambda _: None)
    names = ("num_attention_heads", "hidden_size", "kv_channels", "seq_length", "swiglu")
    typed = dict.fromkeys((*names, "group_query_attention", "num_query_groups", "tokenizer_type"))
    typed |= {"max_position_embeddings": None, "expert_model_parallel_size": 1}
    experts = {"num_experts": 4, "moe_router_topk": 9, "moe_layer_freq": 1}
    read = typed | experts | {"use_checkpoint_args": from_checkpoint}
    typed = read if not from_checkpoint else read | {"num_experts": None}
    monkeypatch.setattr(module, "parse_args", lambda _: Namespace(**typed))
    validated = []

    def validate(_):
        validated.append(True)
        return Namespace(**read)

    monkeypatch.setattr(module, "parse_and_validate_args", validate)
    with pytest.raises(ConfigError, match=r"--moe-router-topk: .* --num-experts 4, found 9"):
        module.parse()
    assert bool(validated) is from_checkpoint
