"""The model of a step against sums done by hand, and the list of layouts that fit."""

from dataclasses import replace

import pytest

from megatron_ext.gpus import GPUS, Gpu
from megatron_ext.planning.layout import Layout, Unlearning
from megatron_ext.planning.ranking import rank_layouts
from megatron_ext.planning.split import Split
from megatron_ext.planning.steps import model_step
from tests.unit.test_plan import ONE, PAPER, SMALL

# Round numbers: a FLOP takes 1 s, a byte through memory 0, unless a test says otherwise.
GPU = Gpu(flops=2.0, memory=10**12, memory_bandwidth=1e30, link=1e30, network=1e30)
DEEP = replace(SMALL, layers=8)
LAYER = 2 * (8 * (12 + 2 * 6) + 12 * 8 + 3 * 8 * 20 + 16 * 12)  # FLOPs of a token
HEAD = 2 * 56 * 8


def step(layout: Layout, unlearning: Unlearning | None = None, arch=DEEP, gpu=GPU):
    sizes = {"gpus_per_node": 8, "utilisation": 0.5}
    return model_step(arch, layout, unlearning, gpu=gpu, **sizes)


def test_one_gpu_computes_and_nothing_else():
    time = step(ONE)
    assert time.compute == pytest.approx(8 * 16 * 3 * (8 * LAYER + HEAD), rel=1e-9)
    assert time.total == pytest.approx(time.compute, rel=1e-9)
    assert step(replace(ONE, recompute="full")).compute == pytest.approx(
        8 * 16 * (4 * 8 * LAYER + 3 * HEAD), rel=1e-9
    )


def test_the_slowest_stage_sets_the_pace_and_chunks_shorten_the_bubble():
    layout = replace(ONE, gpus=2, pp=2, micro_batch=1)
    first, last = 16 * 3 * 4 * LAYER, 16 * 3 * (4 * LAYER + HEAD)
    time = step(layout)
    assert (time.compute, time.bubble) == pytest.approx((8 * last, first), rel=1e-9)
    assert step(replace(layout, vpp=4)).bubble == pytest.approx(first / 4, rel=1e-9)


def test_tensor_parallel_ranks_reduce_four_times_a_layer():
    link = replace(GPU, link=10.0)
    layout = replace(ONE, gpus=2, tp=2, global_batch=2, half=True)
    # A ring of two sends as many bytes as there are: 2 x 16 tokens x 8 x 2 bytes.
    assert step(layout, gpu=link).tensor_parallel == pytest.approx(4 * 8 * 512 / 10)
    full = replace(layout, recompute="full")
    assert step(full, gpu=link).tensor_parallel == pytest.approx(6 * 8 * 512 / 10)


def test_data_parallel_ranks_reduce_once_a_step_and_hide_what_overlaps():
    layout = replace(ONE, gpus=2, half=True, distributed_optimizer=True)
    count = DEEP.parameters()
    slow = replace(GPU, link=0.5)
    assert step(layout, gpu=slow).data_parallel == pytest.approx((4 + 2) * count / 2 / 0.5)
    hidden = replace(layout, overlap_gradients=True, overlap_parameters=True)
    assert step(hidden, gpu=slow).data_parallel == 0
    # The network counts once a group fills more than a node, which has eight adapters.
    slow = replace(GPU, network=0.5)
    far = replace(layout, gpus=16, micro_batch=1, global_batch=16)
    total = (4 + 2) * count * 15 / 16
    assert step(far, gpu=slow).data_parallel == pytest.approx(total / (8 * 0.5))
    assert step(far, gpu=replace(slow, link=1.5)).data_parallel == pytest.approx(total / 1.5)


def test_data_parallel_ranks_of_one_node_do_not_use_the_network():
    slow = replace(GPU, network=0.5)
    layout = replace(ONE, half=True, distributed_optimizer=True, micro_batch=1, global_batch=32)
    inside = replace(layout, gpus=16, tp=2, pp=4)  # two in a group
    assert step(inside, gpu=slow).data_parallel < 1e-9
    # With TP 8 a node has one rank of each group.
    arch = replace(DEEP, heads=8, query_groups=8)
    count = arch.stage_parameters(0, Split(tp=8))
    time = step(replace(layout, gpus=16, tp=8), arch=arch, gpu=slow)
    assert time.data_parallel == pytest.approx((4 + 2) * count / 2 / 0.5)


def test_the_reference_is_a_forward_pass_of_the_replayed_tokens():
    time = step(ONE, Unlearning(forget_batch=2))
    assert time.reference == pytest.approx(6 * 16 * (8 * LAYER + HEAD), rel=1e-9)
    plain = step(ONE, Unlearning(forget_batch=2, reference=False))
    assert (plain.reference, plain.compute) == (0, time.compute)


def test_gradients_are_summed_once_a_microbatch():
    slow = replace(GPU, memory_bandwidth=1.0)
    difference = step(ONE, gpu=slow).compute - step(ONE).compute
    assert difference == pytest.approx(4 * 8 * DEEP.parameters())


def ranked(layout: Layout, gpu: Gpu, arch=PAPER, **more):
    return rank_layouts(arch, layout, gpu=gpu, utilisation=0.45, **more)


PAPER_RUN = Layout(
    gpus=64,
    **{"micro_batch": 1, "global_batch": 256, "sequence": 4096, "half": True},
    **{"distributed_optimizer": True, "overlap_gradients": True, "overlap_parameters": True},
)


def test_layouts_fit_divide_and_are_in_order():
    found = ranked(PAPER_RUN, GPUS["A100-40"], unlearning=Unlearning(forget_batch=128))
    assert found
    for one in found:
        layout = one.layout
        assert layout.tp * layout.pp * layout.data_parallel == 64
        assert all(count % layout.vpp == 0 for count in layout.split.layers(32))
        assert 128 % (layout.micro_batch * layout.data_parallel) == 0
        assert layout.vpp == 1 or layout.microbatches % layout.pp == 0
        assert one.memory <= 40e9
    times = [one.time.total for one in found]
    assert times == sorted(times)
    # With so few parameters nothing is gained by splitting the model.
    assert (found[0].layout.tp, found[0].layout.pp) == (1, 1)


def test_recompute_only_where_nothing_else_fits():
    wide = {
        (o.layout.tp, o.layout.pp, o.layout.vpp, o.layout.micro_batch): o
        for o in ranked(PAPER_RUN, GPUS["H200"])
    }
    tight = ranked(PAPER_RUN, GPUS["A100-40"])
    assert {one.layout.recompute for one in wide.values()} == {"none"}
    key = (1, 1, 1, 4)
    assert wide[key].layout.recompute == "none"
    (same,) = (
        o for o in tight if (o.layout.tp, o.layout.pp, o.layout.vpp, o.layout.micro_batch) == key
    )
    assert same.layout.recompute == "full"


def test_a_large_model_does_not_fit_unsplit():
    large = replace(PAPER, layers=16, hidden=16384, ffn=57344, heads=128, head_size=128)
    found = ranked(PAPER_RUN, GPUS["H100"], arch=large)
    assert found
    assert all(one.layout.tp * one.layout.pp > 2 for one in found)
    assert not ranked(replace(PAPER_RUN, gpus=8), GPUS["A100-40"], arch=large)


def test_tp_stays_within_a_node_and_divides_query_groups():
    grouped = replace(PAPER, query_groups=4)
    sizes = {one.layout.tp for one in ranked(PAPER_RUN, GPUS["H100"], arch=grouped)}
    assert sizes == {1, 2, 4}
    small = {one.layout.tp for one in ranked(PAPER_RUN, GPUS["H100"], gpus_per_node=2)}
    assert small == {1, 2}
    # Sequence parallelism comes with TP.
    odd = replace(PAPER_RUN, sequence=4094)
    assert {one.layout.tp for one in ranked(odd, GPUS["H100"])} == {1, 2}
