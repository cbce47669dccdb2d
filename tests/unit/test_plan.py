"""The plan's formulas against sums done by hand; test_plan_models holds them to Megatron."""

import os
import struct
from dataclasses import replace

import numpy as np
import pytest

from megatron_ext.data.indexed import HEADER, MAGIC
from megatron_ext.exceptions import ConfigError
from megatron_ext.planning.activations import final_norm_bytes, kept_bytes, layer_bytes_per_token
from megatron_ext.planning.architecture import Architecture
from megatron_ext.planning.data import dataset_uses
from megatron_ext.planning.layout import Layout, Unlearning
from megatron_ext.planning.memory import all_stages, checkpoint_bytes, stage_memory
from megatron_ext.planning.split import Split, Tensor
from megatron_ext.planning.state import Bucket, lay_out, state_bytes
from megatron_ext.planning.steps import step_flops

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
    assert arch.stage_parameters(0, Split()) == arch.parameters()


def test_the_demo_has_the_parameters_that_megatron_reported():
    demo = Architecture(
        **{"layers": 4, "hidden": 192, "ffn": 512, "heads": 6, "query_groups": 6},
        **{"head_size": 32, "vocab_size": 4096, "vocab_multiple": 64},
    )
    assert demo.parameters() == 3_344_064
    # Of 40,407,775 bytes on disk less than 1% is not tensors.
    assert 0.99 < checkpoint_bytes(demo, half=False) / 40_407_775 <= 1


def test_the_paper_s_model_by_hand():
    layer = 4 * 2048**2 + 3 * 2048 * 5504 + 2 * 2048
    assert PAPER.parameters() == 32 * layer + 2048 + 2 * 125_696 * 2048 == 2_133_985_280
    # The vocabulary is a multiple of 128, not of 128 x 8.
    assert PAPER.padded_vocab(tp=8) == 125_952
    assert PAPER.parameters(tp=8) - PAPER.parameters() == 2 * 256 * 2048


def test_rows_of_the_vocabulary_that_are_given_are_not_padded():
    given = replace(SMALL, padded=57)
    assert SMALL.parameters() - given.parameters() == -2 * 8
    with pytest.raises(ConfigError, match="--padded-vocab-size: expected a multiple of TP 2"):
        all_stages(given, replace(ONE, gpus=2, tp=2))


def test_state_takes_18_bytes_a_parameter_or_6_and_12_shared():
    count = SMALL.parameters()
    mixed = replace(ONE, gpus=4, half=True)
    # Sizes of the small model are no multiples of 64, so its buffers are padded.
    shared = state_bytes(PAPER, replace(mixed, distributed_optimizer=True), 0)
    assert sum(state_bytes(SMALL, mixed, 0).values()) == 18 * count
    assert sum(shared.values()) == (6 + 12 // 4) * PAPER.parameters()
    assert sum(state_bytes(SMALL, ONE, 0).values()) == 16 * count
    # fp16 gradients are summed in fp16.
    half = replace(mixed, gradient=2)
    assert sum(state_bytes(SMALL, half, 0).values()) == 16 * count


def test_transformer_engine_s_layers_hold_the_first_norm_behind_the_output():
    """In the order of its modules' parameters, as they were read from layers that Megatron's spec built."""
    arch = replace(SMALL, layers=1)
    embedding, output, qkv = 56 * 8, 12 * 8, 8 * (12 + 2 * 6)
    gate_and_up, down = 2 * 8 * 20, 20 * 8
    native = [embedding, 8, output, qkv, 8, gate_and_up, down, 8, embedding]
    assert [t.elements for t in arch.chunk_tensors(0, 0, Split())] == native
    fused = [embedding, output, 8, qkv, 8, gate_and_up, down, 8, embedding]
    fused_arch = replace(arch, fused_norms=True)
    assert [t.elements for t in fused_arch.chunk_tensors(0, 0, Split())] == fused


def test_buffers_are_padded_as_by_hand():
    tensors = [Tensor(100), Tensor(10), Tensor(300), Tensor(50, shared=True)]
    # In reverse: 50, in a bucket of its own up to lcm(3, 128) = 384; 300 from there, which end their
    # bucket at the next multiple of 384; 10 from 768, 100 from 832, the end at 1152.
    laid = lay_out(tensors, ranks=3, bucket_size=300)
    assert laid == [
        Bucket(0, 384, [(0, 50)]),
        Bucket(384, 768, [(384, 684)]),
        Bucket(768, 1152, [(768, 778), (832, 932)]),
    ]
    # Thirds of each bucket: 128 elements from 0, 128, 256 on.
    shards = [sum(bucket.shard(rank, 3) for bucket in laid) for rank in range(3)]
    assert shards == [50 + 128 + 10 + 64, 128 + 36, 44]
    whole = lay_out(tensors[:3], ranks=3, bucket_size=None)
    assert whole == [Bucket(0, 768, [(0, 300), (320, 330), (384, 484)])]


def test_activations_of_a_layer_by_hand():
    # 4 e h + 8 = 72 of the norms; q = 12, k = 6, f = 20: 2 (24 + 12 + 60) = 192; 4 a = 16.
    assert layer_bytes_per_token(SMALL, replace(ONE, half=True)) == 72 + 192 + 16
    ungrouped = replace(SMALL, query_groups=4)  # 2 (24 + 24 + 60) = 216
    assert layer_bytes_per_token(ungrouped, replace(ONE, half=True)) == 72 + 216 + 16
    two = replace(ONE, gpus=2, tp=2, half=True)
    assert layer_bytes_per_token(SMALL, two) == 72 + (192 + 16) / 2
    assert layer_bytes_per_token(SMALL, replace(two, sequence_parallel=True)) == 280 / 2
    assert layer_bytes_per_token(SMALL, replace(ONE, half=True, recompute="full")) == 16
    # Outputs of the norms of queries and keys, 2 x 18, and scales of 6 heads.
    normed = replace(SMALL, qk_norm=True)
    assert layer_bytes_per_token(normed, replace(ONE, half=True)) == 280 + 36 + 4 * 6
    # fp32 doubles all that is not fp32 already.
    assert layer_bytes_per_token(SMALL, ONE) == 2 * (64 + 192) + 8 + 16


def test_selective_recompute_saves_the_log_sum_exp_alone():
    kept, again = (replace(ONE, half=True, recompute=r) for r in ("none", "selective"))
    assert layer_bytes_per_token(SMALL, kept) - layer_bytes_per_token(SMALL, again) == 4 * 4


def test_stages_hold_as_many_microbatches_as_are_in_flight():
    layout = Layout(gpus=4, pp=4, micro_batch=2, global_batch=6, sequence=16, half=True)
    one = 280 * 2 * 16  # a layer's activations of a microbatch
    kept = [kept_bytes(SMALL, layout, stage) for stage in range(4)]
    assert kept == [3 * one, 3 * one, 2 * one, one]  # 3 microbatches in all
    # Of 8 chunks of half a stage: 2 (p - i - 1) + (v - 1) p + 1.
    deep = replace(SMALL, layers=8)
    chunks = replace(layout, vpp=2, global_batch=40)
    assert [kept_bytes(deep, chunks, stage) for stage in range(4)] == [
        n * one for n in (11, 9, 7, 5)
    ]
    assert final_norm_bytes(SMALL, layout) == (4 * 8 + 4) * 2 * 16
    assert [layout.place(rank) for rank in range(4)] == [(i, 0, 0) for i in range(4)]
    assert replace(layout, gpus=16, tp=2, micro_batch=1).place(11)[:2] == (2, 1)


def test_full_recompute_keeps_inputs():
    deep = replace(SMALL, layers=6)
    full = replace(ONE, half=True, recompute="full")
    tokens, entry, whole = 32, 16, 280
    assert kept_bytes(deep, full, 0) == 6 * entry * tokens
    assert kept_bytes(deep, replace(full, recompute_layers=4), 0) == 2 * entry * tokens
    block = replace(full, recompute_method="block", recompute_layers=4)
    assert kept_bytes(deep, block, 0) == (4 * entry + 2 * whole) * tokens


def test_every_stage_is_planned_and_the_head_is_on_the_last():
    layout = Layout(gpus=2, pp=2, micro_batch=1, global_batch=8, sequence=16, half=True)
    first, last = all_stages(SMALL, layout)
    assert (first.head, "head chunk" in first.parts) == (None, False)
    # 56 columns, 16 tokens, and the weight's gradient.
    assert last.head is not None
    assert last.head.bytes == 2 * (56 * 16 + 56 * 8)
    assert last.parts["head chunk"] == last.head.bytes + (4 * 8 + 4) * 16
    assert last.total == sum(last.parts.values())


def test_the_head_takes_its_share_of_a_gpu():
    wide = replace(SMALL, vocab_size=4000)
    layout = replace(ONE, sequence=1000, half=True)
    needed = 2 * 2 * 2000 * 4000
    unlearning = Unlearning(forget_batch=4)

    def head(capacity):
        found = stage_memory(wide, layout, 0, unlearning, capacity=capacity).head
        assert found is not None
        assert found.needed == needed
        return found

    assert head(None) == head(16 * needed)
    assert head(None).logits == head(None).bytes == needed
    # Half of it: two chunks of 1000 tokens each, not a tile more; the gradient of the weight in fp32.
    chunked = head(8 * needed)
    assert (chunked.logits, chunked.bytes) == (needed // 2, needed // 2 + 4 * 4000 * 8)


def test_the_reference_takes_weights_and_a_vector_for_each_replay_token():
    layout = Layout(
        **{"gpus": 4, "pp": 2, "micro_batch": 1, "global_batch": 16, "sequence": 10, "half": True}
    )
    unlearning = Unlearning(forget_batch=4)
    first, last = (stage.parts for stage in all_stages(SMALL, layout, unlearning))
    assert first["reference"] == first["weights"]
    assert first["hidden-state cache"] == 0
    cache = (16 - 4) // 2 * 10 * 8 * 2
    assert last["hidden-state cache"] == cache
    away = stage_memory(SMALL, layout, 1, replace(unlearning, reference_offload=True))
    assert away.parts["reference"] == SMALL.padded_vocab() * 8 * 2
    # Pinned memory is had in powers of two: attention's output, its projection, both of the other products
    # and three norms (the last at the end); without pinning, as on a CPU, just what is moved.
    assert away.host == 2 * (256 + 512 + 1024 + 512 + 2 * 16) + 16
    unpinned = stage_memory(
        SMALL, replace(layout, cpu=True), 1, replace(unlearning, reference_offload=True)
    )
    assert unpinned.host == last["reference"] - away.parts["reference"]
    # While the reference runs all of its weights are on the device.
    state = sum(away.parts[part] for part in ("weights", "gradients", "optimizer"))
    width = 8 + 2 * 12 + 3 * 20
    assert away.reference_pass == state + last["reference"] + cache + 2 * width * 10
    kept = stage_memory(SMALL, layout, 1, replace(unlearning, hidden_offload=True))
    assert (kept.parts["hidden-state cache"], kept.host) == (10 * 8 * 2, 6 * 256)
    without = stage_memory(SMALL, layout, 1, replace(unlearning, reference=False))
    assert "reference" not in without.parts


def test_flops_by_hand():
    matrices = 4 * (8 * (12 + 2 * 6) + 12 * 8 + 3 * 8 * 20) + 56 * 8
    token = 6 * matrices + 4 * 6 * 16 * 12
    assert SMALL.flops_per_token(16) == token
    assert step_flops(SMALL, ONE) == 8 * 16 * token
    # 6 of 8 samples are replayed: a third more for each.
    assert step_flops(SMALL, ONE, Unlearning(forget_batch=2)) == pytest.approx(10 * 16 * token)


def write_index(prefix, tokens, documents=1):
    """A dataset of equal documents; the tokens' bytes are a hole in the file."""
    size = tokens // documents
    starts = [2 * size * document for document in range(documents)]
    with open(f"{prefix}.idx", "wb") as stream:
        stream.write(HEADER.pack(MAGIC, 1, 8, documents, documents + 1))
        stream.write(struct.pack(f"<{documents}i", *[size] * documents))
        stream.write(struct.pack(f"<{documents}q", *starts))
        stream.write(struct.pack(f"<{documents + 1}q", *range(documents + 1)))
    with open(f"{prefix}.bin", "wb") as stream:
        os.truncate(stream.fileno(), tokens * np.dtype(np.uint16).itemsize)
    return str(prefix)


def test_epochs_follow_weights_and_split(tmp_path):
    real, synthetic = write_index(tmp_path / "a", 1000, 10), write_index(tmp_path / "b", 100)
    blend = ["0.98", real, "0.02", synthetic]
    # Documents are split, and Megatron rounds their number: 7 of 10 here, and all of 1.
    uses = dataset_uses(blend, tokens=5000, split="74,26,0")
    assert [use.tokens for use in uses] == [700, 100]
    assert [use.epochs for use in uses] == pytest.approx([4900 / 700, 100 / 100])
    assert dataset_uses([real], tokens=250, split="1,0,0")[0].epochs == 0.25
    # Without weights Megatron blends by size: equally many epochs of each.
    by_size = dataset_uses([real, synthetic], tokens=550, split="1,0,0")
    assert [use.epochs for use in by_size] == pytest.approx([0.5, 0.5])
    for split in ("0,1,0", "a,b"):
        with pytest.raises(ConfigError, match=f"--split: expected .*, found {split}"):
            dataset_uses([real], tokens=1, split=split)


@pytest.mark.parametrize("weight", ["0", "-0.5", "nan", "inf"])
def test_weights_that_no_run_takes_are_refused(weight, tmp_path):
    prefix = write_index(tmp_path / "a", 1000)
    with pytest.raises(ConfigError, match=r"a: expected a weight above 0, found "):
        dataset_uses([weight, prefix], tokens=1, split="1,0,0")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gpus": 3, "tp": 2}, "multiple of 2"),
        ({"micro_batch": 3}, "multiple of 3"),
        ({"gpus": 3, "pp": 3, "vpp": 2}, "multiple of 6"),
    ],
)
def test_layouts_that_do_not_divide_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        replace(ONE, **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gpus": 3, "pp": 3}, "--num-layers: expected a multiple of PP 3, found 4"),
        ({"gpus": 2, "pp": 2, "vpp": 4}, "--num-layers: expected a multiple of PP 2 x 4 chunks"),
        ({"gpus": 8, "tp": 8}, "--num-attention-heads"),
        ({"gpus": 4, "tp": 4}, "--num-query-groups: expected a multiple of TP 4, .* found 2"),
        ({"micro_batch": 4}, "--forget-batch-size: expected a multiple of 4"),
    ],
)
def test_layouts_that_do_not_divide_the_model_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        all_stages(SMALL, replace(ONE, **changes), Unlearning(forget_batch=2))
