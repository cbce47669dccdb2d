import argparse
import contextlib
import json
import os
import subprocess
import sys
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from megatron.core.dist_checkpointing.strategies import torch as strategies
from megatron.training import initialize
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    Metadata,
    TensorProperties,
    TensorStorageMetadata,
)

from megatron_ext import launched
from megatron_ext.exceptions import ConfigError
from megatron_ext.runtime import compat
from tests.helpers.entry import ROOT


def test_another_megatron_core_is_refused():
    with (
        mock.patch.object(compat, "version", return_value="0.20.0"),
        pytest.raises(ConfigError, match=r"expected version 0\.19\.2 .*, found 0\.20\.0"),
    ):
        compat.check_megatron_version()


@pytest.mark.parametrize("found", ["2.9.1", "2.10.0+cu128", "1.13.1"])
def test_a_torch_that_is_too_old_is_refused(found):
    with (
        mock.patch.object(compat, "version", return_value=found),
        pytest.raises(ConfigError, match=r"torch: expected version 2\.11 or newer .*, found "),
    ):
        compat.check_torch_version()


@pytest.mark.parametrize("found", ["2.11.0", "2.11.0a0+a1b2c3.nv26.2", "2.13.0+cu130", "3.0.0"])
def test_a_newer_torch_is_taken(found):
    with mock.patch.object(compat, "version", return_value=found):
        compat.check_torch_version()


def test_what_else_a_newer_torch_stores_of_a_tensor_is_no_obstacle(monkeypatch):
    strategy = strategies.TorchDistLoadShardedStrategy
    monkeypatch.setattr(strategy, "load_tensors_metadata", strategy.load_tensors_metadata)
    stored = TensorStorageMetadata(TensorProperties(torch.bfloat16), torch.Size([2, 3]), [])
    stored.properties.strides = (3, 1)  # as torch 2.15 does
    metadata = Metadata({"weight": stored, "words": BytesStorageMetadata()})
    with pytest.raises(TypeError, match="strides"):
        strategy().load_tensors_metadata("", metadata)
    compat.read_sizes_and_types()
    (read,) = strategy().load_tensors_metadata("", metadata).values()
    assert (read.key, read.global_shape, read.dtype) == ("weight", (2, 3), torch.bfloat16)


@pytest.mark.parametrize(
    ("swiglu", "ffn", "warmed"), [(True, 90, False), (True, 92, True), (False, 90, True)]
)
def test_a_feed_forward_width_that_is_odd_on_a_rank_is_not_warmed_up(
    monkeypatch, swiglu, ffn, warmed
):
    """Megatron's own warm-up halves it, and fails."""
    calls = []
    monkeypatch.setattr(initialize, "_warmup_jit_function", lambda tp_size: calls.append(tp_size))
    args = SimpleNamespace(swiglu=swiglu, ffn_hidden_size=ffn, tensor_model_parallel_size=2)
    monkeypatch.setattr(initialize, "get_args", lambda: args)
    compat.warm_up_even_widths()
    initialize.set_jit_fusion_options(tp_size=2)
    assert calls == ([2] if warmed else [])


def test_help_with_a_bare_per_cent_sign_is_repaired_and_others_are_left():
    parser = argparse.ArgumentParser()
    parser.add_argument("--good", default=3, help="50%% by default, %(default)s")
    # argparse checks the text when an argument is added from some releases on, so it is set afterwards.
    parser.add_argument("--bad").help = "between 5% (cold) and 100%"
    compat.repair_help(parser)
    assert "50% by default, 3" in parser.format_help()
    assert "between 5% (cold) and 100%" in parser.format_help()


def test_a_parser_reads_other_words_and_only_meanwhile():
    before = list(sys.argv)
    with contextlib.suppress(SystemExit), compat.command_line(["--lr", 0.5], program="run.py"):
        assert sys.argv == ["run.py", "--lr", "0.5"]
        argparse.ArgumentParser().parse_args()
    assert sys.argv == before


def test_a_lone_process_meets_itself_and_a_launched_one_is_left_alone():
    with mock.patch.dict(os.environ, {"RANK": "3", "WORLD_SIZE": "8"}, clear=True):
        compat.find_ranks()
        assert dict(os.environ) == {"RANK": "3", "WORLD_SIZE": "8"}
    with mock.patch.dict(os.environ, {}, clear=True):
        compat.find_ranks()
        assert os.environ["WORLD_SIZE"] == "1"
        assert os.environ["MASTER_PORT"] == "0"


MEET = {"MASTER_ADDR": "node0", "MASTER_PORT": "6000"}


def task(rank, local_rank, *, tasks=16, form="8(x2)", **more):
    """The environment of one of srun's tasks, as far as it is read."""
    numbers = {"SLURM_STEP_NUM_TASKS": tasks, "SLURM_PROCID": rank, "SLURM_LOCALID": local_rank}
    numbers |= {"SLURM_STEP_TASKS_PER_NODE": form, **more}
    found = {name: str(value) for name, value in numbers.items()}
    return mock.patch.dict(os.environ, found | MEET, clear=True)


def gpus(count, *, available):
    return mock.patch.multiple(
        torch.cuda, device_count=lambda: count, is_available=lambda: available
    )


def test_tasks_of_srun_are_the_ranks_of_one_run():
    with task(11, 3, SLURM_NTASKS=64):
        compat.find_ranks()
        found = {name: os.environ[name] for name in ("RANK", "WORLD_SIZE", *MEET)}
        assert found == {"RANK": "11", "WORLD_SIZE": "16"} | MEET
        assert (os.environ["LOCAL_RANK"], os.environ["LOCAL_WORLD_SIZE"]) == ("3", "8")
    with task(1, 0, RANK=8):  # srun has started torchrun on each node
        assert launched.rank() == "8"
    # A batch script is alone, though its allocation has tasks.
    with mock.patch.dict(os.environ, {"SLURM_NTASKS": "64", "SLURM_PROCID": "0"}, clear=True):
        compat.find_ranks()
        assert os.environ["WORLD_SIZE"] == "1"


@pytest.mark.parametrize(
    ("form", "node", "tasks"),
    [("8(x64)", 63, 8), ("8,7", 0, 8), ("8,7", 1, 7), ("8(x3),7,6(x2)", 3, 7), ("4", 0, 4)],
)
def test_tasks_of_a_node_are_read_from_all_forms_of_slurm(form, node, tasks):
    with task(11, 3, form=form, SLURM_NODEID=node):
        compat.find_ranks()
        assert os.environ["LOCAL_WORLD_SIZE"] == str(tasks)


def test_tasks_that_see_one_gpu_of_their_node_each_are_refused():
    found = r"CUDA_VISIBLE_DEVICES: .* all 8 tasks .*, found 1"
    with task(8, 0), gpus(1, available=True), pytest.raises(ConfigError, match=found):
        compat.find_ranks()


def test_more_ranks_of_torchrun_than_gpus_are_refused():
    def rank(local_rank):
        ranks = {"RANK": "9", "LOCAL_RANK": local_rank, "LOCAL_WORLD_SIZE": "2"}
        return mock.patch.dict(os.environ, ranks, clear=True)

    found = r"--nproc-per-node: expected one rank a GPU, found LOCAL_RANK 1 and 1 GPU"
    with rank("1"), gpus(1, available=True), pytest.raises(ConfigError, match=found):
        compat.find_ranks()
    # The other rank is ended with it; a launcher that shows each rank its own GPU calls each of them 0.
    for local_rank, count, available in (("0", 1, True), ("1", 2, True), ("1", 1, False)):
        with rank(local_rank), gpus(count, available=available):
            compat.find_ranks()
            assert os.environ["RANK"] == "9"


def test_tasks_without_a_gpu_are_ranks_too():
    """The CPU runtime answers for the count of devices, with one until the ranks are known."""
    with task(1, 1, tasks=2, form="2"), gpus(1, available=False):
        compat.find_ranks()
        assert (os.environ["RANK"], os.environ["LOCAL_WORLD_SIZE"]) == ("1", "2")


@pytest.mark.parametrize("many", [{"SLURM_STEP_NUM_TASKS": "16"}, {"OMPI_COMM_WORLD_SIZE": "16"}])
def test_one_of_many_tasks_does_not_take_itself_for_the_only_one(many):
    with (
        mock.patch.dict(os.environ, many, clear=True),
        pytest.raises(ConfigError, match=r"RANK: expected .* torchrun.*, found one of 16 tasks"),
    ):
        compat.find_ranks()


@pytest.mark.parametrize(
    "read",
    [lambda a, b: a, lambda a, b: [a, b], lambda a, b: [a, None], lambda a, b: None],
    ids=["a stage", "two chunks", "a chunk that reads none", "a stage that reads none"],
)
def test_a_skipped_iteration_reads_its_microbatches_wherever_data_are_read(monkeypatch, read):
    import megatron.training.training as loop

    once = SimpleNamespace(should_run_forward_backward=mock.Mock(side_effect=[True, False]))
    monkeypatch.setattr("megatron.core.rerun_state_machine.get_rerun_state_machine", lambda: once)
    monkeypatch.setattr(loop, "get_num_microbatches", lambda: 3)
    monkeypatch.setattr(loop, "dummy_train_step", loop.dummy_train_step)  # put back afterwards
    # A microbatch as the loader gives it: not all of it are tensors.
    iterators = [iter([{"source": [f"sample {i}"]} for i in range(9)]) for _ in range(2)]
    given = read(*iterators)
    compat.skip_on_every_layout()
    loop.dummy_train_step(given)
    for iterator in iterators:
        was_read = iterator in (given if isinstance(given, list) else [given])
        assert next(iterator) == {"source": [f"sample {3 if was_read else 0}"]}


@pytest.mark.parametrize("asked", ["--help", "--he", "-h"])
def test_help_texts_are_read_once_and_are_the_same(monkeypatch, asked):
    monkeypatch.setattr(sys, "argv", ["pretrain_unlearn.py", "--bf16", asked])
    from megatron.training.argument_utils import ArgumentGroupFactory

    from megatron_ext.config import ChatConfig, UnlearnConfig

    def texts():
        return [
            ArgumentGroupFactory(config).field_docstrings for config in (ChatConfig, UnlearnConfig)
        ]

    wanted = texts()
    assert wanted[1]["forget_data_path"]
    read = ArgumentGroupFactory._get_field_docstrings
    with mock.patch.object(ArgumentGroupFactory, "_get_field_docstrings", autospec=True) as counted:
        counted.side_effect = read
        compat.read_docstrings_for_help()
        assert texts() == wanted
        once = counted.call_count
        texts()[0].clear()
        assert texts() == wanted
        assert counted.call_count == once
        monkeypatch.setattr(sys, "argv", ["pretrain_unlearn.py", "--bf16", "--hidden-size", "-1"])
        assert texts() == [{}, {}]


@pytest.mark.parametrize(("given", "expected"), [(None, "1"), ("8", "8")])
def test_one_queue_is_asked_for_unless_the_user_says_otherwise(monkeypatch, given, expected):
    """Megatron ends with TP or CP on a GPU before Blackwell where nobody has said anything."""
    name = "CUDA_DEVICE_MAX_CONNECTIONS"
    monkeypatch.setenv(name, "")  # so that it is as before afterwards
    monkeypatch.delenv(name)
    if given is not None:
        monkeypatch.setenv(name, given)
    compat.ask_for_one_queue()
    assert os.environ[name] == expected


# What of Megatron and torch is another function once a run has begun, by the module that has it.
SEAMS = {
    "megatron.training.training": [
        *("build_pretraining_data_loader", "dummy_train_step", "get_train_valid_test_num_samples"),
        *("print_rank_last", "save_checkpoint", "setup_model_and_optimizer", "training_log"),
        "compute_throughputs_and_append_to_progress_log",
    ],
    "megatron.training.checkpointing": ["_load_global_dist_base_checkpoint"],
    "megatron.training.initialize": ["_warmup_jit_function"],
    "megatron.training.dist_signal_handler": ["DistributedSignalHandler.signals_received"],
    "megatron.core.datasets.utils": ["compile_helpers"],
    "megatron.core.dist_checkpointing": ["save"],
    "megatron.core.dist_checkpointing.serialization": ["verify_integrity_manifest"],
    "megatron.core.dist_checkpointing.strategies.torch": [
        "TorchDistLoadShardedStrategy.load_tensors_metadata"
    ],
    "megatron.core.optimizer.optimizer": [
        *("ChainedOptimizer.load_state_dict", "ChainedOptimizer.prepare_grads"),
        *("Float16OptimizerWithFloat16Params.load_state_dict", "FP32Optimizer.load_state_dict"),
    ],
    "megatron.core.optimizer.distrib_optimizer": [
        "DistributedOptimizer.load_state_dict",
        "DistributedOptimizer.sharded_param_state_dp_reshardable",
        "DistributedOptimizer.sharded_param_state_fully_reshardable",
    ],
    "megatron.core.optimizer_param_scheduler": ["OptimizerParamScheduler.load_state_dict"],
    "megatron.core.tensor_parallel.random": ["CheckpointFunction.forward"],
    "megatron.core.transformer.moe.router": ["TopKRouter._maintain_float32_expert_bias"],
    "torch.distributed.checkpoint.filesystem": ["pickle.load"],
}


def test_every_workaround_is_in_its_place():
    """One that is not applied lets a run go on, with other weights, without a word."""
    program = """
import importlib, json, operator, sys
from megatron_ext.runtime import compat, cpu
cpu.enable()
compat.apply()
for module, names in json.loads(sys.argv[1]).items():
    for name in names:
        found = operator.attrgetter(name)(importlib.import_module(module))
        if not found.__module__.startswith("megatron_ext."):
            print(module, name)
"""
    command = [sys.executable, "-W", "ignore", "-c", program, json.dumps(SEAMS)]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert (result.returncode, result.stdout) == (0, ""), result.stderr
