"""The plan's formulas against real models, real optimizers' bytes, and sums done by hand."""

import os
import struct
import subprocess
import sys
from argparse import Namespace
from dataclasses import replace
from types import SimpleNamespace

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
from tests.helpers import models
from tests.helpers.distributed import run_ranks
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


def _count_on_ranks(shapes):
    """Parameters of real GPTs on this rank, whole and as pipeline stages; and of the whole at TP 1."""
    models.start(tensor_parallel=2)
    from megatron.core.models.gpt import GPTModel

    from megatron_ext.model.layer_spec import torch_native_layer_spec

    counts = []
    for arch, pre, post, layers in shapes:
        cfg = models.config(
            num_layers=layers,
            hidden_size=arch.hidden,
            num_attention_heads=arch.heads,
            num_query_groups=arch.query_groups,
            kv_channels=arch.head_size,
            ffn_hidden_size=arch.ffn,
        )
        model = GPTModel(
            config=cfg,
            transformer_layer_spec=torch_native_layer_spec(cfg),
            vocab_size=arch.padded_vocab(tp=2),
            max_sequence_length=16,
            position_embedding_type="rope",
            share_embeddings_and_output_weights=arch.tied,
            pre_process=pre,
            post_process=post,
        )
        counts.append(sum(p.numel() for p in model.parameters()))
    return counts


def test_parameters_are_those_of_real_models_on_each_rank():
    wide = Architecture(
        layers=2, hidden=32, ffn=48, heads=4, query_groups=4, head_size=8, vocab_size=500
    )
    tied = replace(SMALL, tied=True)
    shapes = [
        (SMALL, True, True, 4),
        (wide, True, True, 2),
        (tied, True, True, 4),
        (SMALL, True, False, 2),
        (SMALL, False, True, 2),
    ]
    planned = [
        SMALL.stage_parameters(0, tp=2, pp=1),
        wide.stage_parameters(0, tp=2, pp=1),
        tied.stage_parameters(0, tp=2, pp=1),
        SMALL.stage_parameters(0, tp=2, pp=2),
        SMALL.stage_parameters(1, tp=2, pp=2),
    ]
    for counts in run_ranks(_count_on_ranks, 2, shapes):
        assert counts == planned


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


def test_padding_is_megatron_s():
    from megatron.core.tokenizers.utils.build_tokenizer import vocab_size_with_padding

    for size in (1, 128, 129, 50_257, 63_264, 125_696):
        for tp in (1, 2, 8):
            args = Namespace(
                make_vocab_size_divisible_by=128, tensor_model_parallel_size=tp, rank=1
            )
            assert replace(PAPER, vocab_size=size).padded_vocab(tp) == vocab_size_with_padding(
                size, args
            )


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


def _kept_bytes(arch, tokens):
    """Bytes that a stack of layers really keeps for the backward pass, parameters left out."""
    import torch
    from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
    from megatron.core.transformer.transformer_block import TransformerBlock

    from megatron_ext.model.layer_spec import torch_native_layer_spec

    cfg = models.config(
        num_layers=arch.layers,
        hidden_size=arch.hidden,
        num_attention_heads=arch.heads,
        num_query_groups=arch.query_groups,
        kv_channels=arch.head_size,
        ffn_hidden_size=arch.ffn,
    )
    block = TransformerBlock(cfg, torch_native_layer_spec(cfg), post_layer_norm=False)
    angles = RotaryEmbedding(arch.head_size, 1.0, use_cpu_initialization=True)(tokens)
    parameters = {p.untyped_storage().data_ptr() for p in block.parameters()}
    # Storages stay referenced, so that no address is used twice.
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage
        return tensor

    hidden = torch.randn(tokens, 1, arch.hidden, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        block(hidden, None, rotary_pos_emb=angles)
    return sum(storage.nbytes() for storage in kept.values())


def _layer_kept(archs, tokens):
    """Of each architecture, bytes a token that its second layer adds to its first."""
    models.start()
    stacks = [[_kept_bytes(replace(arch, layers=n), tokens) for n in (1, 2)] for arch in archs]
    return [(two - one) / tokens for one, two in stacks]


def test_activations_of_a_layer_are_what_autograd_keeps():
    grouped = replace(SMALL, hidden=64, heads=4, query_groups=2, head_size=16, ffn=160)
    archs = [grouped, replace(grouped, query_groups=4, head_size=24)]
    # On a CPU torch's RMSNorm is composed of steps and keeps a product more; on a GPU it is fused.
    planned = [activation_bytes_per_token(arch, ONE) + 2 * 4 * 64 for arch in archs]
    assert run_ranks(_layer_kept, 1, archs, 128) == [planned]


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


class _Unset(SimpleNamespace):
    """Megatron's arguments, with None for all that are not given."""

    def __getattr__(self, name):
        return None


@pytest.mark.parametrize("arch", [PAPER, replace(PAPER, query_groups=8, tied=True)])
def test_flops_are_those_that_megatron_reports(arch):
    from megatron.training.training import num_floating_point_operations

    args = _Unset(
        num_layers=arch.layers,
        hidden_size=arch.hidden,
        ffn_hidden_size=arch.ffn,
        num_attention_heads=arch.heads,
        group_query_attention=True,
        num_query_groups=arch.query_groups,
        kv_channels=arch.head_size,
        padded_vocab_size=arch.padded_vocab(),
        seq_length=4096,
        swiglu=True,
    )
    layout = replace(ONE, sequence=4096)
    reported = num_floating_point_operations(args, layout.global_batch)
    assert step_flops(arch, layout) == pytest.approx(reported, rel=1e-12)


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
