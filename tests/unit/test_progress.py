"""What is added to Megatron's line of a step, and a progress.txt that ends no run."""

import logging
from argparse import Namespace
from types import SimpleNamespace

import megatron.training.training as loop
import pytest
import torch
from megatron.core.distributed import param_and_grad_buffer

from megatron_ext.config import UnlearnConfig
from megatron_ext.gpus import of_device
from megatron_ext.planning.layout import Unlearning
from megatron_ext.planning.steps import step_flops
from megatron_ext.runtime import progress
from megatron_ext.runtime.progress import Progress, duration
from megatron_ext.training import UnlearnStep
from tests.unit.test_plan import ONE, SMALL


def args(**changes):
    flags = {"seq_length": 4096, "world_size": 1, "log_timers_to_tensorboard": True}
    return Namespace(**flags | {"step_batch_size_schedule": None} | changes)


def line(iteration, milliseconds):
    return (
        f" [2026-01-01 00:00:00.000000] iteration {iteration:8d}/ 1000000 | consumed samples:  12 | "
        f"elapsed time per iteration (ms): {milliseconds:.1f} | throughput per GPU (TFLOP/s/GPU): 494.5 | "
        "learning rate: 1.0E-03 | global batch size:   256 | lm loss: 4.0E+00 | loss scale: 1.0 |"
    )


@pytest.fixture
def logged(monkeypatch):
    """By step, what TensorBoard is given."""
    found = {}
    writer = SimpleNamespace(add_scalar=lambda tag, value, step: found.update({(tag, step): value}))
    monkeypatch.setattr("megatron.training.get_tensorboard_writer", lambda: writer)
    return found


def test_a_step_has_its_rate_and_what_is_left(logged):
    shown = Progress(args(world_size=8), peak=989e12)
    for iteration in (1, 2):  # which count the first step
        assert "left" not in shown.complete(line(iteration, 90_000.0))
    assert shown.complete(line(3, 2000.0)) == (
        f"{line(3, 2000.0)} tokens/s: 524288 | tokens/s/GPU: 65536 | MFU: 50.0% | left: 23 d 3:33 |"
    )
    # At the mean of the two, 1.5 s.
    assert shown.complete(line(999_000, 1000.0)).endswith(" | left: 0:25 |")
    assert logged == {("tokens-per-second", 3): 524288, ("tokens-per-second", 999_000): 1048576}


def test_what_is_not_known_is_not_said(logged):
    shown = Progress(args(step_batch_size_schedule="0:8 100:16"), peak=None)
    for _ in range(4):
        assert shown.complete(line(3, 2000.0)) == f"{line(3, 2000.0)} tokens/s: 524288 |"
    others = (
        " validation loss at iteration 3 | lm loss value: 1.0E+00 | ",
        " iteration        3 | forget loss: -1.0E+00 |",
    )
    for other in (*others, line(3, 0.0)):
        assert shown.complete(other) == other


@pytest.mark.parametrize(("weight", "reference"), [(1.0, True), (0.0, False)])
def test_operations_are_those_of_the_plan_reference_included(monkeypatch, weight, reference):
    """Of a model whose attention is grouped, by Megatron's count and by the plan's."""
    sizes = {"num_layers": 4, "hidden_size": 8, "ffn_hidden_size": 20, "num_attention_heads": 4}
    sizes |= {
        "group_query_attention": True,
        "num_query_groups": 2,
        "kv_channels": 3,
        "swiglu": True,
    }
    sizes |= {
        "padded_vocab_size": 56,
        "seq_length": 16,
        "global_batch_size": 8,
        "num_experts": None,
    }
    others = ("hybrid_layer_pattern", "moe_latent_size", "mtp_num_layers", "linear_attention_freq")
    others += ("experimental_attention_variant", "multi_latent_attention", "attention_output_gate")
    others += ("moe_ffn_hidden_size", "moe_shared_expert_intermediate_size", "moe_router_topk")
    flags = Namespace(**sizes, **dict.fromkeys(others))
    config = UnlearnConfig(forget_data_path=["x"], forget_batch_size=2, mitigation_weight=weight)
    wrapped = (
        "num_floating_point_operations",
        "get_forward_backward_func",
        "evaluate",
        "train_step",
        "build_pretraining_data_loader",
    )
    for name in wrapped:
        monkeypatch.setattr(loop, name, getattr(loop, name))
    buckets = param_and_grad_buffer._ParamAndGradBucketGroup
    monkeypatch.setattr(buckets, "check_grads", buckets.check_grads)
    UnlearnStep(flags, config, reference=lambda: None).install()
    expected = step_flops(SMALL, ONE, Unlearning(forget_batch=2, reference=reference))
    assert loop.num_floating_point_operations(flags, 8) == pytest.approx(expected, rel=1e-12)


def test_peaks_are_those_of_the_very_device():
    assert of_device("NVIDIA H200").flops == 989e12
    assert of_device("NVIDIA H100 PCIe") is of_device("cpu") is None


@pytest.mark.parametrize(
    ("seconds", "text"), [(29, "0:00"), (3599, "1:00"), (86399, "1 d 0:00"), (184000, "2 d 3:07")]
)
def test_durations(seconds, text):
    assert duration(seconds) == text


def test_a_torn_progress_file_is_told_and_left(monkeypatch, caplog, tmp_path):
    (tmp_path / "progress.txt").write_text("2026-01-01 00:00:00\tJob")
    asked = []

    def rank():
        asked.append(True)
        return 0

    monkeypatch.setattr(torch.distributed, "get_rank", rank)
    monkeypatch.setattr(loop, "append_to_progress_log", loop.append_to_progress_log)
    name = "compute_throughputs_and_append_to_progress_log"
    monkeypatch.setattr(loop, name, getattr(loop, name))
    found = Namespace(save=str(tmp_path), world_size=1, num_floating_point_operations_so_far=0)
    monkeypatch.setattr(loop, "get_args", lambda: found)
    with pytest.raises(IndexError):
        getattr(loop, name)(3, 1e9)
    progress.write_on_one_rank()
    with caplog.at_level(logging.WARNING):
        getattr(loop, name)(3, 1e9)
    assert f"--log-progress: {tmp_path}/progress.txt cannot be read (IndexError" in caplog.text
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 1)
    caplog.clear()
    getattr(loop, name)(3, 1e9)
    assert asked
    assert not caplog.text
