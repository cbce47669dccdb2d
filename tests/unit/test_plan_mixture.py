"""The plan of mixtures of experts against sums done by hand; test_plan_check holds them to Megatron."""

from dataclasses import replace

import pytest

from megatron_ext.exceptions import ConfigError
from megatron_ext.gpus import GPUS
from megatron_ext.planning.activations import kept_bytes, layer_bytes_per_token
from megatron_ext.planning.flags import architecture, entry_flags, layout
from megatron_ext.planning.layout import Layout, Place
from megatron_ext.planning.memory import all_stages
from megatron_ext.planning.mixture import Mixture
from megatron_ext.planning.ranking import rank_layouts
from megatron_ext.planning.split import Split, Tensor
from megatron_ext.planning.state import state_bytes
from tests.unit.test_plan import ONE, SMALL
from tests.unit.test_plan_ranking import GPU, HEAD, step
from tests.unit.test_plan_run import MODEL

FIRST_IS_DENSE = (False, True, True, True)
MIXTURE = Mixture(layers=FIRST_IS_DENSE, experts=4, topk=2, ffn=6, shared=10, gate=True)
ROUTED = replace(SMALL, mixture=MIXTURE)
OUTPUT, QKV = 12 * 8, 8 * (12 + 2 * 6)
# Sizes that are multiples of 64, so that no buffer is padded.
ROUND = replace(
    SMALL,
    **{"hidden": 64, "ffn": 128, "heads": 4, "query_groups": 4, "head_size": 16, "vocab_size": 128},
    mixture=Mixture(layers=(True,) * 4, experts=8, topk=2, ffn=64),
)
QWEN = [
    *MODEL,
    *("--num-layers", "48", "--num-query-groups", "4", "--group-query-attention"),
    *("--kv-channels", "128", "--qk-layernorm", "--vocab-size", "151936"),
    *("--num-experts", "128", "--moe-router-topk", "8", "--moe-ffn-hidden-size", "768"),
]


def test_parameters_and_those_that_a_token_meets_by_hand():
    attention = QKV + OUTPUT + 2 * 8
    expert, always = 3 * 8 * 6, 4 * 8 + 8 + 3 * 8 * 10  # the router, the gate, what all tokens have
    table = 2 * 56 * 8 + 8
    dense = attention + 3 * 8 * 20
    assert ROUTED.parameters() == dense + 3 * (attention + always + 4 * expert) + table
    assert ROUTED.active_parameters() == dense + 3 * (attention + always + 2 * expert) + table
    assert SMALL.active_parameters() == SMALL.parameters()
    assert ROUTED.stage_parameters(0, Split()) == ROUTED.parameters()


def test_qwen3_30b_a3b_has_the_parameters_of_its_name():
    arch = architecture(entry_flags(QWEN))
    assert (arch.parameters() / 1e9, arch.active_parameters() / 1e9) == pytest.approx(
        (30.5, 3.35), abs=0.05
    )


def test_a_rank_s_tensors_are_in_megatron_s_order():
    one = replace(ROUTED, layers=1, mixture=replace(MIXTURE, layers=(True,)))
    first = [Tensor(64 * 8 // 2), Tensor(8), Tensor(OUTPUT // 2), Tensor(QKV // 2), Tensor(8)]
    shared = [Tensor(8), Tensor(2 * 5 * 8), Tensor(5 * 8), Tensor(8), Tensor(64 * 8 // 2)]
    up, down = Tensor(2 * 6 * 8, expert=True), Tensor(6 * 8, expert=True)
    router, split = Tensor(4 * 8), Split(tp=2, ep=2)
    assert one.chunk_tensors(0, 0, split) == [*first, router, up, down, up, down, *shared]
    grouped = replace(one, mixture=replace(one.mixture, grouped=True))
    assert grouped.chunk_tensors(0, 0, split) == [*first, router, up, up, down, down, *shared]
    # Spread as the rest, they are in its buffers.
    half = [Tensor(2 * 3 * 8), Tensor(3 * 8)] * 4
    assert one.chunk_tensors(0, 0, Split(tp=2, etp=2)) == [*first, router, *half, *shared]


def test_chunks_have_the_kinds_of_their_layers():
    deep = replace(
        ROUTED, layers=8, mixture=replace(MIXTURE, layers=(True, False, False, False) * 2)
    )
    split = Split(pp=2, vpp=2)
    found = [
        [kind is not None for kind in deep.kinds(stage, chunk, split)]
        for chunk in range(2)
        for stage in range(2)
    ]
    assert found == [[True, False], [False, False]] * 2
    # Of 4 chunks in flight on the first stage 2 are of its first chunk, and all have one mixture.
    layout = replace(ONE, gpus=2, pp=2, vpp=2, half=True, micro_batch=1)
    dense, mixed = (layer_bytes_per_token(deep, layout, kind) for kind in (None, deep.mixture))
    assert layout.in_flight(0) == 5
    assert kept_bytes(deep, layout, 0) == 5 * 16 * (dense + mixed)
    assert kept_bytes(deep, layout, 1) == 3 * 16 * 2 * dense


def test_activations_of_a_mixture_by_hand():
    half = replace(ONE, half=True)
    # As a dense layer, 280, but for its SwiGLU, 2 x 3 x 20; rows, 2 (2 (8 + 18) + 4); 20 of each of a token's
    # experts; 5 of each expert; the gate, 20, and what all tokens have, 2 x 3 x 10.
    kept = 280 - 120 + 112 + 40 + 20 + 20 + 60
    assert layer_bytes_per_token(ROUTED, half, MIXTURE) == kept
    sent = replace(MIXTURE, dispatcher="alltoall")
    assert layer_bytes_per_token(ROUTED, half, sent) == kept + 3 * 4
    # Half of the tokens, but with experts in halves the rows of both ranks, each of half the width.
    two = replace(half, gpus=2, tp=2, sequence_parallel=True)
    rows = 2 * 2 * (2 * (8 + 9) + 4)
    assert (
        layer_bytes_per_token(ROUTED, two, MIXTURE)
        == (280 - 120 + 60) / 2 + (rows + 40 + 2 * 20 + 20) / 2
    )
    whole = replace(two, expert_tp=1)
    assert (
        layer_bytes_per_token(ROUTED, whole, MIXTURE)
        == (280 - 120 + 60) / 2 + (112 + 40 + 20 + 20) / 2
    )


def test_experts_share_the_optimizer_among_ranks_of_their_own():
    layout = replace(ONE, gpus=16, micro_batch=1, global_batch=16, half=True, ep=4)
    shared = replace(layout, distributed_optimizer=True)
    experts = 4 * 2 * 3 * 64 * 64  # of 8 in each of 4 layers
    dense = ROUND.stage_parameters(0, layout.split) - experts
    assert (layout.shards, layout.expert_shards) == (16, 4)
    assert sum(state_bytes(ROUND, layout, 0).values()) == 18 * (dense + experts)
    assert sum(state_bytes(ROUND, shared, 0).values()) == pytest.approx(
        6 * (dense + experts) + 12 * (dense / 16 + experts / 4), rel=1e-3
    )


def test_ranks_of_experts_are_counted_apart():
    layout = replace(ONE, gpus=16, micro_batch=1, tp=2, pp=2, ep=2, expert_tp=1)
    # The first stage has ranks 0 to 7: TP fastest; of the experts' groups of 2 the third.
    assert layout.place(5) == Place(stage=0, shard=2, expert_shard=2)
    assert layout.place(15) == Place(stage=1, shard=3, expert_shard=3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gpus": 3, "ep": 3}, "--num-experts: expected a multiple of .*-parallel-size 3, found 4"),
        (
            {"gpus": 2, "ep": 4},
            "--gpus: expected a multiple of 4 .--expert-model-parallel-size 4., found 2",
        ),
        (
            {"gpus": 4, "expert_tp": 4},
            "--moe-ffn-hidden-size: expected a multiple of the experts' TP 4, found 6",
        ),
        ({"gpus": 2, "tp": 2}, "--sequence-parallel: expected it beside --num-experts 4"),
    ],
)
def test_layouts_that_do_not_divide_the_experts_are_refused(changes, message):
    many = replace(ONE, **changes, micro_batch=1, global_batch=12)
    with pytest.raises(ConfigError, match=message):
        all_stages(ROUTED, many)


def test_rows_go_to_their_experts_and_back():
    link = replace(GPU, link=10.0)
    layout = replace(ONE, gpus=2, ep=2, global_batch=4, half=True)
    # Half of the rows, 2 a token, to the other rank; forward and back, and both again; 3 layers.
    sent = replace(ROUTED, mixture=replace(MIXTURE, dispatcher="alltoall"))
    one = 32 * 8 * 2 / 10
    assert step(layout, arch=sent, gpu=link).expert_parallel == pytest.approx(4 * 3 * one)
    # The tokens of the other rank instead.
    assert step(layout, arch=ROUTED, gpu=link).expert_parallel == pytest.approx(4 * 3 * one)
    four = replace(layout, gpus=4, ep=4, micro_batch=1)
    assert step(four, arch=sent, gpu=link).expert_parallel == pytest.approx(4 * 3 * 0.75 * one)
    assert step(four, arch=ROUTED, gpu=link).expert_parallel == pytest.approx(4 * 3 * 1.5 * one)
    again = replace(layout, recompute="full")
    assert step(again, arch=sent, gpu=link).expert_parallel == pytest.approx(6 * 3 * one)
    assert step(replace(ONE, gpus=2), arch=sent, gpu=link).expert_parallel == 0


def test_the_stage_with_most_mixtures_sends_most_rows():
    # Over links so slow that this stage is the slowest.
    link, first = replace(GPU, link=1e-4), (True, False, False, False, False, False, False, False)
    layout = replace(ONE, gpus=4, pp=2, ep=2, micro_batch=1, global_batch=8, half=True)
    for layers, most in ((first, 1), ((True, False) * 4, 2), ((True,) * 4 + (False,) * 4, 4)):
        arch = replace(ROUTED, layers=8, mixture=replace(MIXTURE, layers=layers))
        one = 16 * 8 * 2 / 1e-4
        found = step(layout, arch=arch, gpu=link)
        assert found.expert_parallel == pytest.approx(4 * 4 * most * one)
    # The first stage has layers 0, 1, 4 and 5, and so two mixtures, of its first chunk.
    two = replace(layout, vpp=2)
    assert step(two, arch=arch, gpu=link).expert_parallel == pytest.approx(4 * 4 * 2 * one)


def test_a_mixture_that_no_token_passes_as_a_whole_reduces_attention_alone():
    link = replace(GPU, link=10.0)
    layout = replace(ONE, gpus=2, tp=2, global_batch=2, half=True, sequence_parallel=True)
    one = 512 / 10  # as of a dense layer, in test_plan_ranking
    routed = replace(ROUTED, mixture=replace(MIXTURE, shared=0, gate=False))
    for arch, forward in ((SMALL, 8), (ROUTED, 8), (routed, 2 + 3)):
        found = step(layout, arch=arch, gpu=link)
        assert found.tensor_parallel == pytest.approx(2 * forward * one)
        full = step(replace(layout, recompute="full"), arch=arch, gpu=link)
        assert full.tensor_parallel == pytest.approx(3 * forward * one)
    # Of two stages the one with the dense layer has more; over links so slow that it is the slowest.
    apart, link = replace(layout, gpus=4, pp=2, expert_tp=1), replace(GPU, link=10.0 / 1e5)
    assert step(apart, arch=routed, gpu=link).tensor_parallel == pytest.approx(2 * 3 * one * 1e5)
    # Over others that is the one with the head, in which communication is no more than its own.
    assert step(apart, arch=routed, gpu=replace(GPU, link=10.0)).tensor_parallel == pytest.approx(
        2 * 2 * one
    )


def test_only_the_experts_of_a_token_compute():
    attention = 8 * (12 + 2 * 6) + 12 * 8
    dense, mixed = (2 * (attention + 3 * 8 * width + 16 * 12) for width in (20, 2 * 6 + 10))
    expected = 8 * 16 * 3 * (dense + 3 * mixed + HEAD)
    assert step(ONE, arch=ROUTED).compute == pytest.approx(expected, rel=1e-9)


def test_layouts_of_a_mixture_spread_its_experts():
    arch = architecture(entry_flags(QWEN))
    run = Layout(
        **{"gpus": 16, "micro_batch": 1, "global_batch": 64, "sequence": 4096, "half": True},
        distributed_optimizer=True,
    )
    found = rank_layouts(arch, run, gpu=GPUS["H100"], utilisation=0.45)
    assert found
    for one in found:
        where = one.layout
        assert 128 % where.ep == 0
        assert 16 % (where.ep * where.tp * where.pp) == 0
    # With EP 2 weights and gradients alone are 92 GB.
    assert {one.layout.ep for one in found if one.layout.pp == one.layout.tp == 1} == {4, 8, 16}


def test_flags_of_a_mixture_are_read_as_the_entry_point_reads_them():
    flags = entry_flags([*QWEN, "--expert-model-parallel-size", "8", "--moe-layer-freq", "3"])
    mixture = architecture(flags).mixture
    assert mixture is not None
    assert mixture.layers == (True, False, False) * 16
    assert (mixture.experts, mixture.topk, mixture.ffn, mixture.dispatcher) == (
        *(128, 8, 768),
        "allgather",
    )
    where = layout(flags, gpus=16)
    assert (where.ep, where.etp) == (8, 1)
    wide = architecture(entry_flags([*MODEL, "--num-experts", "8"])).mixture
    assert wide is not None
    assert (wide.ffn, wide.topk) == (5504, 2)  # that of dense layers, and Megatron's default


@pytest.mark.parametrize(
    ("pattern", "layers"),
    [
        ("[0]+[1]*31", (False, *[True] * 31)),
        ("([0]*3 + [1]) * 8", (False, False, False, True) * 8),
        ("2", (True, False) * 16),
    ],
)
def test_patterns_of_layers(pattern, layers):
    words = [*MODEL, "--num-experts", "8", "--moe-layer-freq", pattern]
    mixture = architecture(entry_flags(words)).mixture
    assert mixture is not None
    assert mixture.layers == layers


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--moe-layer-freq", "[1]*8"], r"--moe-layer-freq: .* each of 32 layers, .*, of 8"),
        (["--moe-layer-freq", "[2]*32"], r"--moe-layer-freq: .* found \[2\]\*32"),
        (["--moe-layer-freq", "0"], "--moe-layer-freq: expected a number above 0"),
        (["--moe-layer-freq", "__import__('os')"], "--moe-layer-freq: .* found __import__"),
        (["--moe-layer-freq", "[1]*[2]"], "--moe-layer-freq: "),
        (["--moe-layer-freq", "[1]*31 + [[0]]"], "--moe-layer-freq: "),
        (
            ["--moe-router-topk", "9"],
            "--moe-router-topk: expected 1 to --num-experts 8, found 9",
        ),
        (["--moe-token-dispatcher-type", "flex"], "--moe-token-dispatcher-type: .* found flex"),
    ],
)
def test_mixtures_that_cannot_be_are_named(words, message):
    with pytest.raises(ConfigError, match=message):
        architecture(entry_flags([*MODEL, "--num-experts", "8", *words]))


def test_flags_of_mixtures_that_are_not_planned_are_named():
    with pytest.raises(ConfigError, match="--moe-latent-size is not supported by the plan"):
        entry_flags([*QWEN, "--moe-latent-size", "64"])
    with pytest.raises(ConfigError, match="--expert-tensor-parallel-num-weight-shards is not supp"):
        entry_flags([*QWEN, "--expert-tensor-parallel-num-weight-shards", "2"])
    alone = entry_flags([*MODEL, "--expert-model-parallel-size", "2"])
    with pytest.raises(ConfigError, match=r"--num-experts: expected beside .*-size 2, found none"):
        architecture(alone)
