import argparse

import pytest

from megatron_ext.checkpoint.inspect import (
    TRACKER,
    Checkpoint,
    check_architecture,
    has_checkpoint,
    open_checkpoint,
)
from megatron_ext.conversion.to_huggingface import export_model
from megatron_ext.exceptions import CheckpointError
from tests.helpers.checkpoints import write_iterations
from tools.plan_blend import counted

MODEL = {
    "num_layers": 4,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "kv_channels": 8,
    "group_query_attention": True,
    "num_query_groups": 2,
    "swiglu": True,
    "add_bias_linear": True,
    "seq_length": 64,
    "max_position_embeddings": 64,
    "unpadded_vocab_size": 500,
    "padded_vocab_size": 512,
    "tokenizer_digest": "abc",
    # YaRN's, which the names of the others do not cover.
    "rotary_scaling_factor": 4.0,
    "yarn_original_max_position_embeddings": 4096,
}


def check(tmp_path, saved, now):
    checkpoint = Checkpoint(
        tmp_path, 5, tmp_path / "iter_0000005", argparse.Namespace(**MODEL | saved)
    )
    check_architecture(checkpoint, argparse.Namespace(**MODEL | now), flag="--load")


def test_the_same_model_passes(tmp_path):
    check(tmp_path, {}, {})
    check(tmp_path, {}, {"seq_length": 32})
    # Stock Megatron records neither of these.
    check(tmp_path, {"unpadded_vocab_size": None, "tokenizer_digest": None}, {})


def test_layers_without_rotation_are_compared_however_they_are_written(tmp_path):
    for saved, now in ((4, [0, 0, 0, 1]), ([0, 1, 0, 1], 2), (None, [0] * 4), ([1, 0, 1, 1],) * 2):
        check(tmp_path, {"no_rope_freq": saved}, {"no_rope_freq": now})
    with pytest.raises(
        CheckpointError,
        match=r"^--load: expected --no-rope-freq None, .* found \[0, 1, 0, 1\] in",
    ):
        check(tmp_path, {"no_rope_freq": 2}, {"no_rope_freq": None})


def test_a_model_that_is_not_computed_here_is_refused(tmp_path):
    with pytest.raises(
        CheckpointError, match=r"^--load: .*iter_0000005 was trained with --use-mup"
    ):
        check(tmp_path, {"use_mup": True}, {})
    check(tmp_path, {"use_mup": False, "is_hybrid_model": None}, {})


@pytest.mark.parametrize(
    ("now", "message"),
    [
        ({"hidden_size": 64}, "--load: expected --hidden-size 64, .* found 32 in .*iter_0000005"),
        # Of several differences the first in the order of the list, not any.
        (
            {"kv_channels": 9, "hidden_size": 64, "swiglu": False},
            "--load: expected --hidden-size 64",
        ),
        ({"swiglu": False}, "--load: expected --swiglu False, .* found True"),
        (
            {"add_bias_linear": False},
            "--load: expected --disable-bias-linear True, .* found False",
        ),
        ({"num_query_groups": 4}, "--load: expected --num-query-groups 4, .* found 2"),
        ({"group_query_attention": False}, "--load: expected --num-query-groups 4, .* found 2"),
        ({"rotary_scaling_factor": 8.0}, "--rotary-scaling-factor 8.0, .* found 4.0"),
        (
            {"yarn_original_max_position_embeddings": 2048},
            "--yarn-original-max-position-embeddings 2048, .* found 4096",
        ),
        ({"seq_length": 128}, "--seq-length: expected at most 64, .*found 128"),
        ({"unpadded_vocab_size": 501}, "--tokenizer-model: .* 500.*, found .* 501"),
        ({"tokenizer_digest": "xyz"}, "--tokenizer-model: .* abc.*, found .* xyz"),
    ],
)
def test_another_model_is_refused(tmp_path, now, message):
    with pytest.raises(CheckpointError, match=message):
        check(tmp_path, {}, now)


def test_a_mixture_routed_by_another_rule_is_another_model(tmp_path):
    name, experts = "moe_router_load_balancing_type", {"num_experts": 4}

    def compare(saved, now):
        check(tmp_path, experts | saved, experts | now)

    # What balances by a loss, or not at all, routes alike; older checkpoints do not tell.
    compare({name: ["aux_loss", "global_aux_loss"]}, {name: "none"})
    compare({}, {name: "sinkhorn"})
    compare({name: "sinkhorn"}, {name: "sinkhorn"})
    check(tmp_path, {name: "sinkhorn"}, {name: "aux_loss"})  # dense
    for rule in ("sinkhorn", "quantile_balancing"):
        message = "another than sinkhorn or quantile_balancing, as this run has, found"
        with pytest.raises(CheckpointError, match=rf"--{name.replace('_', '-')} {message} {rule} "):
            compare({name: rule}, {name: "aux_loss"})
    interleaved = {"moe_mlp_glu_interleave_size": 32}
    with pytest.raises(CheckpointError, match=r"--moe-mlp-glu-interleave-size None, .* found 32"):
        compare(interleaved, dict.fromkeys(interleaved))


def test_a_vocabulary_beyond_a_stock_checkpoints_padding_is_refused(tmp_path):
    stock = {"unpadded_vocab_size": None, "tokenizer_digest": None}
    with pytest.raises(CheckpointError, match=r"at most the 512 ids .*, found 513"):
        check(tmp_path, stock, {"unpadded_vocab_size": 513})


def test_a_directory_without_a_tracker_has_no_checkpoint(tmp_path):
    assert not has_checkpoint(None)
    assert not has_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match=f"--load: expected .*{TRACKER}"):
        open_checkpoint(tmp_path, flag="--load")
    with pytest.raises(CheckpointError, match=r"--load: .* found nothing at .*no_such"):
        open_checkpoint(tmp_path / "no_such", flag="--load")


@pytest.mark.parametrize("text", ["", "five", "-1"])
def test_a_tracker_that_names_no_iteration_is_refused(tmp_path, text):
    (tmp_path / TRACKER).write_text(text)
    with pytest.raises(CheckpointError, match=f"{TRACKER}: expected an iteration number"):
        open_checkpoint(tmp_path, flag="--load")


@pytest.mark.parametrize(("text", "folder"), [("5", "iter_0000005"), ("release", "release")])
def test_a_missing_iteration_is_refused(tmp_path, text, folder):
    (tmp_path / TRACKER).write_text(text)
    with pytest.raises(CheckpointError, match=f"expected a torch_dist checkpoint at .*{folder}"):
        open_checkpoint(tmp_path, flag="--load")


@pytest.mark.parametrize(
    ("held", "found"),
    [((), "none"), ((20, 5), "5, 20"), (range(10, 90, 10), "3 others, 40, 50, 60, 70, 80")],
)
def test_an_iteration_that_is_not_there_is_named_by_its_flag(tmp_path, held, found):
    (tmp_path / TRACKER).write_text("20")
    write_iterations(tmp_path, *held)
    for broken in ("iter_0000003.old", "iter_0000999"):  # another name, and a save that did not end
        (tmp_path / broken).mkdir()
        (tmp_path / broken / "metadata.json").touch()
    message = f"an iteration that {tmp_path} (--run) holds, found {found}"
    for flags, flag in (({}, "--ckpt-step"), ({"iteration_flag": "--iteration"}, "--iteration")):
        with pytest.raises(CheckpointError) as refused:
            open_checkpoint(tmp_path, flag="--run", iteration=15, **flags)
        assert str(refused.value) == f"{flag} 15: expected {message}"


@pytest.mark.parametrize(
    ("read", "flag"),
    [
        (lambda path: export_model(path, path / "out", iteration=15), "--checkpoint"),
        (lambda path: counted(argparse.Namespace(run=path, iteration=15)), "--run"),
    ],
)
def test_tools_name_their_own_flag_for_an_iteration(tmp_path, read, flag):
    (tmp_path / TRACKER).write_text("20")
    with pytest.raises(
        CheckpointError, match=rf"^--iteration 15: .* \({flag}\) holds, found none$"
    ):
        read(tmp_path)


def test_a_folder_can_be_named(tmp_path):
    (tmp_path / TRACKER).write_text("7")
    with pytest.raises(CheckpointError, match=r"torch_dist checkpoint at .*/release, found none"):
        open_checkpoint(tmp_path, flag="--reference-load", folder="release")


def test_the_folder_of_an_iteration_is_told_from_that_of_the_run(tmp_path):
    (tmp_path / TRACKER).write_text("5")
    (tmp_path / "iter_0000005").mkdir()
    with pytest.raises(CheckpointError, match=f"name the folder above, {tmp_path}$"):
        open_checkpoint(tmp_path / "iter_0000005", flag="--load")
