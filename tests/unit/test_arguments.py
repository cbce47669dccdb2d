"""Flags and their checks, without a run; the entry point's messages are in tests/integration."""

import json
import subprocess
import sys
from argparse import Namespace

import pytest

from megatron_ext import launched
from tests.helpers.entry import ROOT

# In a process of its own: machine_defaults depends on the CPU runtime, which changes torch for good.
DEFAULTS = """
import json, sys
from argparse import ArgumentParser
sys.path.insert(0, sys.argv.pop())
from megatron_ext.runtime import cpu
cpu.enable()
from megatron.training.arguments import add_megatron_arguments
from megatron_ext import arguments
parser = add_megatron_arguments(ArgumentParser(allow_abbrev=False))
known = {action.dest for action in parser._actions}
arguments.add_arguments(parser)
defaults = arguments.machine_defaults()
given = vars(parser.parse_args(["--num-workers", "3"]))
print(json.dumps({
    "unknown": sorted(defaults.keys() - known),
    "not taken": sorted(k for k, v in defaults.items() if given[k] != v),
    "ours": sorted(k for k in given if k.startswith(("forget", "replay", "mitigation", "reference"))),
    "fused": [k for k in ("masked_softmax_fusion", "apply_rope_fusion") if given[k]],
    "no persistent norm": given["no_persist_layer_norm"],
    "weights": [given[f"{k}_weight"] for k in ("forget", "replay", "mitigation")],
}))
"""


@pytest.fixture(scope="module")
def parsed(tmp_path_factory):
    packages = tmp_path_factory.mktemp("packages")
    for name in ("apex", "transformer_engine"):  # as in a container for GPUs
        (packages / name).mkdir()
        (packages / name / "__init__.py").write_text("raise ImportError('no CUDA device')")
    result = subprocess.run(
        [sys.executable, "-c", DEFAULTS, str(packages)], cwd=ROOT, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


def test_defaults_of_the_machine_are_flags_that_megatron_has(parsed):
    assert parsed["unknown"] == []


def test_a_typed_flag_wins_over_a_default_of_the_machine(parsed):
    assert parsed["not taken"] == ["num_workers"]


def test_without_a_device_nothing_of_the_gpu_packages_is_asked_for(parsed):
    assert parsed["fused"] == []
    assert parsed["no persistent norm"]


def test_each_field_of_the_config_is_a_flag(parsed):
    assert parsed["weights"] == [0.01, 1.0, 1.0]
    assert {"forget_data_path", "forget_loss", "reference_load"} <= set(parsed["ours"])


def arguments(**changes):
    """Parsed arguments of an unlearning run that nothing is wrong with."""
    fields = {
        "fp8": None,
        "global_batch_size": 16,
        "micro_batch_size": 2,
        "eval_global_batch_size": 16,
        "eval_micro_batch_size": 2,
        "data_parallel_size": 2,
        "train_iters": 10,
        **{"train_samples": None, "step_batch_size_schedule": None, "skip_train": False},
        **{"eval_iters": 1, "pipeline_model_parallel_size": 2},
        "virtual_pipeline_model_parallel_size": None,
        "microbatch_group_size_per_vp_stage": None,
    }
    return Namespace(**(fields | changes))


@pytest.mark.parametrize(
    ("forget", "changes", "message"),
    [
        (6, {}, "--forget-batch-size: expected a multiple of 4 .*found 6 of 16"),
        (16, {}, "--forget-batch-size: .* fewer than the global batch of 16 .*found 16"),
        (20, {}, "--forget-batch-size: .*found 20"),
        (None, {"global_batch_size": 1}, "--forget-batch-size: expected at least 1 .*found 0"),
        (
            4,
            {"eval_global_batch_size": 8},
            "--eval-global-batch-size: .*multiple of 4 .*found 2 of 8",
        ),
        (4, {"eval_global_batch_size": 6}, "--eval-global-batch-size: .*4 of every 16 .*found 6"),
        (
            4,
            {"eval_micro_batch_size": 4},
            "--eval-global-batch-size: expected a multiple of 8 .*found 4",
        ),
    ],
)
def test_compositions_that_do_not_divide_are_refused(forget, changes, message):
    from megatron_ext.batches import check_batches
    from megatron_ext.config import UnlearnConfig
    from megatron_ext.exceptions import ConfigError

    config = UnlearnConfig(forget_data_path=["a"], forget_batch_size=forget)
    with pytest.raises(ConfigError, match=message):
        check_batches(arguments(**changes), config)
    check_batches(arguments(**changes), UnlearnConfig())
    check_batches(arguments(), UnlearnConfig(forget_data_path=["a"]))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"eval_global_batch_size": 4}, "--eval-global-batch-size: .* at least 2 .* found 1 "),
        ({"eval_global_batch_size": 12}, "--eval-global-batch-size: .* of at least 2, found 3 "),
        ({"micro_batch_size": 8}, "--global-batch-size: .* at least 2 .* found 1 "),
        (
            {"microbatch_group_size_per_vp_stage": 3, "skip_train": True},
            "--eval-global-batch-size: .* groups of 3, .* found 4 ",
        ),
        (
            {"microbatch_group_size_per_vp_stage": 4, "eval_global_batch_size": 12},
            "--eval-global-batch-size: .* at least 4 .* found 3 ",
        ),
    ],
)
def test_batches_that_the_interleaved_schedule_would_not_take_are_refused(changes, message):
    from megatron_ext.batches import check_batches
    from megatron_ext.config import UnlearnConfig
    from megatron_ext.exceptions import ConfigError

    interleaved = {"virtual_pipeline_model_parallel_size": 2}
    with pytest.raises(ConfigError, match=message):
        check_batches(arguments(**interleaved, **changes), UnlearnConfig())
    fitting = {"eval_global_batch_size": 20, "microbatch_group_size_per_vp_stage": 3}
    least = interleaved | {"eval_global_batch_size": 8}
    for right in (changes, least, least | {"global_batch_size": 32} | fitting):
        check_batches(arguments(**right), UnlearnConfig())
    without = {"eval_global_batch_size": 4, "eval_iters": 0}
    check_batches(arguments(**interleaved, **without), UnlearnConfig())


def test_a_run_without_a_step_is_refused():
    from megatron_ext.batches import check_batches
    from megatron_ext.config import UnlearnConfig
    from megatron_ext.exceptions import ConfigError

    length = {"train_iters": None, "train_samples": 15}
    with pytest.raises(ConfigError, match=r"--train-samples: .* the 16 .* found 15"):
        check_batches(arguments(**length), UnlearnConfig())
    check_batches(arguments(**length, skip_train=True), UnlearnConfig())
    check_batches(arguments(train_iters=None, train_samples=16), UnlearnConfig())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, None),
        (
            {"world_size": 6},
            r"ranks .*--nproc-per-node\): .* 4 \(--tensor-model-parallel-size 2 x "
            r"--pipeline-model-parallel-size 2\), found 6",
        ),
        (
            {"micro_batch_size": 3},
            r"--global-batch-size: .* 6 \(--micro-batch-size 3 x data-parallel size 2\), found 16",
        ),
        ({"micro_batch_size": 3, "global_batch_size": None}, None),  # it is made of microbatches
        ({"micro_batch_size": 3, "decrease_batch_size_if_needed": True}, None),  # Megatron cuts it
        ({"micro_batch_size": None}, None),  # named as missing elsewhere
        ({"eval_global_batch_size": 6}, r"--eval-global-batch-size: .* \(--micro-.*, found 6"),
        ({"eval_micro_batch_size": 3}, r"--eval-global-batch-size: .* \(--eval-micro-.*, found 16"),
        ({"num_experts": 4, "sequence_parallel": False}, "--sequence-parallel: .* --num-experts 4"),
        ({"num_experts": 4, "expert_model_parallel_size": 2}, None),
        (
            {"num_experts": 4, "expert_model_parallel_size": 3},
            "--num-experts: .* --expert-model-parallel-size 3, found 4",
        ),
        (
            {"num_experts": 8, "expert_model_parallel_size": 8},
            r"ranks .* 32 \(--tensor-.* 2 x --expert-model-parallel-size 8 x --pipeline-.* 2\), found 8",
        ),
        (
            {"num_experts": 4, "expert_tensor_parallel_size": 3},
            r"ranks .* 6 \(--expert-tensor-parallel-size 3 x --pipeline-.* 2\), found 8",
        ),
    ],
)
def test_ranks_and_batches_that_do_not_divide_are_named_by_their_flags(changes, message):
    from megatron_ext.batches import check_layout
    from megatron_ext.exceptions import ConfigError

    sizes = {"tensor_model_parallel_size": 2, "context_parallel_size": 1, "world_size": 8}
    unset = {"eval_global_batch_size": None, "eval_micro_batch_size": None}
    unset |= {"decrease_batch_size_if_needed": False, "num_experts": None}
    sizes |= {"expert_model_parallel_size": 1, "sequence_parallel": True}
    unset |= {"expert_tensor_parallel_size": None}
    args = arguments(**(sizes | unset | changes))
    if message is None:
        check_layout(args)
    else:
        with pytest.raises(ConfigError, match=f"^{message}"):
            check_layout(args)


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, True),
        ({"RANK": "3", "LOCAL_RANK": "3"}, True),  # srun: nobody would end the others
        ({"TORCHELASTIC_RUN_ID": "job", "RANK": "8", "LOCAL_RANK": "0"}, True),
        ({"TORCHELASTIC_RUN_ID": "job", "RANK": "9", "LOCAL_RANK": "1"}, False),
    ],
)
def test_under_torchrun_one_rank_of_a_node_looks_at_the_files(environment, expected, monkeypatch):
    for name in ("TORCHELASTIC_RUN_ID", "RANK", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert launched.looks_at_files() is expected


REQUIRED = {
    **{
        "micro_batch_size": 1,
        "tokenizer_type": "SentencePieceTokenizer",
        "num_layers": 2,
        "lr": 1.0,
    },
    **{"hidden_size": 8, "num_attention_heads": 2, "max_position_embeddings": 8},
    **{"seq_length": None, "encoder_seq_length": 8, "train_iters": None, "train_samples": 16},
    **{"use_checkpoint_args": False, "skip_train": False, "save": None, "save_interval": None},
}


@pytest.mark.parametrize(
    ("changes", "supplied", "missing"),
    [
        ({}, {}, None),
        ({"lr": None, "train_samples": None}, {}, "--lr, --train-iters or --train-samples: "),
        ({"train_samples": None}, {"train_iters": 7}, None),
        ({"train_samples": None, "lr": None, "skip_train": True}, {}, None),
        ({"num_layers": None, "encoder_seq_length": None, "use_checkpoint_args": True}, {}, None),
        ({"encoder_seq_length": None}, {}, "--seq-length or --encoder-seq-length: "),
        ({"micro_batch_size": None, "use_checkpoint_args": True}, {}, "--micro-batch-size: "),
        ({"save": "ckpt"}, {}, "--save-interval: "),
        ({"save": "ckpt", "save_interval": 5}, {}, None),
    ],
)
def test_every_flag_that_is_missing_is_named(changes, supplied, missing):
    from megatron_ext.exceptions import ConfigError
    from megatron_ext.values import check_required

    args = Namespace(**(REQUIRED | changes))
    if missing is None:
        check_required(args, supplied=supplied)
    else:
        with pytest.raises(ConfigError, match=f"^{missing}expected a value, found none"):
            check_required(args, supplied=supplied)


@pytest.mark.parametrize(
    ("changes", "layers"),
    [
        ({"transformer_impl": "transformer_engine"}, "Transformer Engine"),
        ({"transformer_impl": "local"}, "torch-native layers"),
        ({"transformer_impl": "local", "spec": ["module", "name"]}, "layers of --spec module name"),
    ],
)
def test_the_layers_that_a_run_uses_are_named(changes, layers, monkeypatch):
    import torch

    from megatron_ext import arguments as module

    monkeypatch.setattr(module.cpu, "is_enabled", lambda: False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "H200")
    assert module.describe_runtime(Namespace(**({"spec": None} | changes))) == f"H200: {layers}"


@pytest.mark.parametrize(("rows", "tp"), [(499, 1), (384, 2), (513, 2)])
def test_rows_that_do_not_hold_the_tokens_or_cannot_be_shared_are_named(rows, tp):
    from megatron_ext.data.checks import check_vocabulary
    from megatron_ext.exceptions import ConfigError

    sizes = {"unpadded_vocab_size": 500, "tensor_model_parallel_size": tp}
    check_vocabulary(Namespace(padded_vocab_size=512, **sizes))
    message = (
        "--padded-vocab-size: expected at least the tokenizer's 500 tokens, in a multiple of TP"
    )
    with pytest.raises(ConfigError, match=f"{message} {tp}, found {rows}"):
        check_vocabulary(Namespace(padded_vocab_size=rows, **sizes))


_DELAYED = {"fp8": "hybrid", "fp8_recipe": "delayed", "data_parallel_size": 1}
_DELAYED |= {"global_batch_size": 16, "micro_batch_size": 2}


@pytest.mark.parametrize(("length", "rule"), [(1, "most_recent"), (7, "max"), (8, "most_recent")])
def test_scales_of_fp8_that_do_not_know_all_gradients_are_refused(length, rule):
    from megatron_ext.batches import check_batches
    from megatron_ext.config import UnlearnConfig
    from megatron_ext.exceptions import ConfigError

    unlearning = UnlearnConfig(forget_data_path=["a"])
    history = {"fp8_amax_history_len": length, "fp8_amax_compute_algo": rule}
    found = f"at least 8, the passes of a step, and max, .* found {length} and {rule}"
    with pytest.raises(ConfigError, match=found):
        check_batches(arguments(**_DELAYED, **history), unlearning)
    # Without unlearning, and by another rule for scales, they do.
    check_batches(arguments(**_DELAYED, **history), UnlearnConfig())
    check_batches(arguments(**_DELAYED | {"fp8_recipe": "tensorwise"}, **history), unlearning)
    right = {"fp8_amax_history_len": 8, "fp8_amax_compute_algo": "max"}
    interleaved = {"virtual_pipeline_model_parallel_size": 2} | right
    with pytest.raises(ConfigError, match="at least 16, the passes of a step"):
        check_batches(arguments(**_DELAYED, **interleaved), unlearning)
    check_batches(arguments(**_DELAYED, **right), unlearning)
