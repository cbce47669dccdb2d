"""The plan's formulas against sums done by hand; test_plan_models holds them to Megatron."""

import os
import struct
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

from megatron_ext.analysis.plan import (
    Architecture,
    Layout,
    Unlearning,
    activation_bytes_per_token,
    checkpoint_bytes,
    dataset_uses,
    stage_memory,
    step_flops,
    worst_stage,
)
from megatron_ext.data.indexed import HEADER, MAGIC
from megatron_ext.exceptions import ConfigError
from tests.helpers.entry import ROOT

PAPER = Architecture(
    layers=32, hidden=2048, ffn=5504, heads=32, query_groups=32, head_size=64, vocab_size=125_696
)
SMALL = Architecture(
    layers=4,
    hidden=8,
    ffn=20,
    heads=4,
    query_groups=2,
    head_size=3,
    vocab_size=50,
    vocab_multiple=8,
)
ONE = Layout(gpus=1, micro_batch=2, global_batch=8, sequence=16)


@pytest.mark.parametrize("arch", [SMALL, replace(SMALL, tied=True), PAPER])
def test_one_gpu_holds_all_parameters(arch):
    assert arch.stage_parameters(0, tp=1, pp=1) == arch.parameters()


def test_the_demo_has_the_parameters_that_megatron_reported():
    demo = Architecture(
        **{"layers": 4, "hidden": 192, "ffn": 512, "heads": 6, "query_groups": 6},
        **{"head_size": 32, "vocab_size": 4096, "vocab_multiple": 64},
    )
    assert demo.parameters() == 3_344_064
    # Of 40,407,775 bytes on disk less than 1% is not tensors.
    assert 0.99 < checkpoint_bytes(demo, bf16=False) / 40_407_775 <= 1


def test_the_paper_s_model_by_hand():
    layer = 4 * 2048**2 + 3 * 2048 * 5504 + 2 * 2048
    assert PAPER.parameters() == 32 * layer + 2048 + 2 * 125_696 * 2048 == 2_133_985_280
    # The vocabulary is a multiple of 128, not of 128 x 8.
    assert PAPER.padded_vocab(tp=8) == 125_952
    assert PAPER.parameters(tp=8) - PAPER.parameters() == 2 * 256 * 2048


def test_state_takes_18_bytes_a_parameter_or_6_and_12_shared():
    count = SMALL.parameters()
    mixed = replace(ONE, gpus=4, bf16=True)
    parts = ("weights", "gradients (fp32)", "master and moments (fp32)")

    def state(layout):
        memory = stage_memory(SMALL, layout, 0)
        return sum(memory[part] for part in parts)

    assert state(mixed) == 18 * count
    assert state(replace(mixed, distributed_optimizer=True)) == (6 + 12 // 4) * count
    assert state(ONE) == 16 * count


def test_activations_of_a_layer_by_hand():
    # 4 e h + 8 = 72 of the norms; q = 12, k = 6, f = 20: 2 (36 + 12 + 60) = 216; 4 a = 16.
    assert activation_bytes_per_token(SMALL, replace(ONE, bf16=True)) == 72 + 216 + 16
    ungrouped = replace(SMALL, query_groups=4)  # 2 (24 + 24 + 60) = 216
    assert activation_bytes_per_token(ungrouped, replace(ONE, bf16=True)) == 72 + 216 + 16
    two = replace(ONE, gpus=2, tp=2, bf16=True)
    assert activation_bytes_per_token(SMALL, two) == 72 + (216 + 16) / 2
    assert activation_bytes_per_token(SMALL, replace(two, sequence_parallel=True)) == 304 / 2
    assert activation_bytes_per_token(SMALL, replace(ONE, bf16=True, recompute="full")) == 16
    # fp32 doubles all that is not fp32 already.
    assert activation_bytes_per_token(SMALL, ONE) == 2 * (64 + 216) + 8 + 16


def test_stages_hold_as_many_microbatches_as_are_in_flight():
    layout = Layout(gpus=4, pp=4, micro_batch=2, global_batch=6, sequence=16, bf16=True)
    one = 304 * 2 * 16  # a layer's activations of a microbatch
    kept = [stage_memory(SMALL, layout, stage)["activations"] for stage in range(4)]
    # 3 microbatches in all; the last stage also keeps input and output of the final norm.
    assert kept == [3 * one, 3 * one, 2 * one, one + 2 * 2 * 8 * 2 * 16]


def test_the_worst_stage_is_the_one_with_the_largest_sum():
    wide = replace(SMALL, vocab_size=4000)
    layout = Layout(gpus=2, pp=2, micro_batch=1, global_batch=1, sequence=16)
    assert worst_stage(wide, layout)[0] == 1  # one microbatch; the final norm decides
    deep = replace(layout, global_batch=8, sequence=256)
    stage, parts = worst_stage(wide, deep)
    assert (stage, parts) == (0, stage_memory(wide, deep, 0))


def test_the_reference_takes_weights_and_a_vector_for_each_replay_token():
    layout = Layout(
        **{"gpus": 4, "pp": 2, "micro_batch": 1, "global_batch": 16, "sequence": 10, "bf16": True}
    )
    unlearning = Unlearning(forget_batch=4)
    first, last = (stage_memory(SMALL, layout, i, unlearning) for i in (0, 1))
    assert first["reference weights"] == first["weights"]
    assert first["reference hidden states"] == 0
    assert last["reference hidden states"] == (16 - 4) // 2 * 10 * 8 * 2
    offloaded = stage_memory(SMALL, layout, 1, Unlearning(forget_batch=4, reference_offload=True))
    assert offloaded["reference weights"] == SMALL.padded_vocab() * 8 * 2
    without = stage_memory(SMALL, layout, 1, Unlearning(forget_batch=4, reference=False))
    assert "reference weights" not in without


def test_flops_by_hand():
    matrices = 4 * (8 * (12 + 2 * 6) + 12 * 8 + 3 * 8 * 20) + 56 * 8
    token = 6 * matrices + 4 * 6 * 16 * 12
    assert SMALL.flops_per_token(16) == token
    assert step_flops(SMALL, ONE) == 8 * 16 * token
    # 6 of 8 samples are replayed: a third more for each.
    assert step_flops(SMALL, ONE, Unlearning(forget_batch=2)) == pytest.approx(10 * 16 * token)


def write_index(prefix, tokens):
    """A dataset of one document; the tokens' bytes are a hole in the file."""
    with open(f"{prefix}.idx", "wb") as stream:
        stream.write(HEADER.pack(MAGIC, 1, 8, 1, 2) + struct.pack("<iqqq", tokens, 0, 0, 1))
    with open(f"{prefix}.bin", "wb") as stream:
        os.truncate(stream.fileno(), tokens * np.dtype(np.uint16).itemsize)
    return str(prefix)


def test_epochs_follow_weights_and_split(tmp_path):
    real, synthetic = write_index(tmp_path / "a", 1000), write_index(tmp_path / "b", 100)
    blend = ["0.98", real, "0.02", synthetic]
    uses = dataset_uses(blend, tokens=5000, split="999,1,0")
    assert [use.tokens for use in uses] == pytest.approx([999, 99.9])
    assert [use.epochs for use in uses] == pytest.approx([4900 / 999, 100 / 99.9])
    assert dataset_uses([real], tokens=250, split="1,0,0")[0].epochs == 0.25
    # Without weights Megatron blends by size: equally many epochs of each.
    by_size = dataset_uses([real, synthetic], tokens=550, split="1,0,0")
    assert [use.epochs for use in by_size] == pytest.approx([0.5, 0.5])
    with pytest.raises(ConfigError, match="--split"):
        dataset_uses([real], tokens=1, split="0,1,0")


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"gpus": 3, "tp": 2}, "multiple of 2"), ({"micro_batch": 3}, "multiple of 3")],
)
def test_layouts_that_do_not_divide_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        replace(ONE, **changes)


def test_stages_and_heads_that_do_not_divide_are_refused():
    with pytest.raises(ConfigError, match="--num-layers"):
        worst_stage(SMALL, replace(ONE, gpus=3, pp=3))
    with pytest.raises(ConfigError, match="--num-attention-heads"):
        worst_stage(SMALL, replace(ONE, gpus=8, tp=8))


def test_the_tool_imports_no_torch_and_names_what_is_missing():
    code = (
        "import sys; sys.argv = ['plan_run.py']; import tools.plan_run as t; "
        "assert not {'torch', 'megatron'} & set(sys.modules); t.entry_flags(['--seq-length', '8'])"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert "ConfigError: --num-layers: expected a size" in result.stderr
