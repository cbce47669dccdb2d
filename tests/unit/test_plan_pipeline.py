"""The plan of pipelines, uneven ones too: a stage's layers by Megatron, a step's time by a clock."""

import contextlib
import itertools
import json
import math
from dataclasses import replace

import pytest

from megatron_ext.exceptions import ConfigError
from megatron_ext.gpus import Gpu
from megatron_ext.planning.activations import kept_bytes
from megatron_ext.planning.flags import entry_flags, layout
from megatron_ext.planning.layout import Layout, Unlearning
from megatron_ext.planning.ranking import rank_layouts
from megatron_ext.planning.split import Split
from megatron_ext.planning.steps import StepTime, model_step
from megatron_ext.stages import check_stages
from tests.helpers.pipeline_clock import step_seconds
from tests.unit.test_plan import ONE, SMALL
from tests.unit.test_plan_run import MODEL, run

# A FLOP takes a second, and nothing else takes any time.
GPU = Gpu(flops=1.0, memory=10**12, memory_bandwidth=1e30, link=1e30, network=1e30)
DEEP = replace(SMALL, layers=24, vocab_size=504)
FIRST, LAST = "--decoder-first-pipeline-num-layers", "--decoder-last-pipeline-num-layers"


def megatron_s_layers(layers: int, split: Split) -> list[list[int]]:
    """The layers of each chunk of each stage, as Megatron counts them.

    Raises:
        ValueError: Megatron refuses the split.
    """
    from megatron.core.transformer.transformer_block import get_num_layers_to_build
    from megatron.core.transformer.transformer_config import TransformerConfig
    from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

    config = TransformerConfig(
        num_layers=layers,
        hidden_size=8,
        num_attention_heads=1,
        pipeline_model_parallel_size=split.pp,
        virtual_pipeline_model_parallel_size=split.vpp if split.vpp > 1 else None,
        num_layers_in_first_pipeline_stage=split.first,
        num_layers_in_last_pipeline_stage=split.last,
        pipeline_dtype=None if split.pp == 1 else "unused",
    )
    found = []
    for stage, chunk in itertools.product(range(split.pp), range(split.vpp)):
        place = (config, chunk if split.vpp > 1 else None, stage)
        start = get_transformer_layer_offset(*place)
        found.append(list(range(start, start + get_num_layers_to_build(*place))))
    return found


def test_layers_of_all_splits_are_those_that_megatron_builds():
    """Every split of 1 to 9 layers: the same layers, or a refusal by both."""
    accepted = mended = 0
    for layers, pp, vpp in itertools.product(range(1, 10), range(1, 5), range(1, 4)):
        own = [None, *range(layers + 2)]
        for first, last in itertools.product(own, own):
            # There is no such schedule, and one stage is not the first beside a last one.
            if pp == 1 and (vpp > 1 or None not in (first, last)):
                continue
            split = Split(pp=pp, vpp=vpp, first=first, last=last)
            try:
                built = megatron_s_layers(layers, split)
            except (ValueError, AssertionError, ZeroDivisionError):
                built = None
            # It builds some splits with layers that are missing or doubled.
            whole = built is not None and sorted(itertools.chain(*built)) == list(range(layers))
            mended += built is not None and not whole
            try:
                check_stages(layers, pp, chunks=vpp, first=first, last=last)
            except ConfigError:
                assert not whole, split
                continue
            accepted += 1
            assert whole, split
            places = itertools.product(range(pp), range(vpp))
            assert [list(split.chunk_layers(layers, *place)) for place in places] == built
    assert accepted > 200
    assert mended > 50


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"first": 0}, f"{FIRST}: expected at least 1, found 0"),
        ({"last": 3, "chunks": 2}, f"{LAST}: expected a multiple of .*-rank 2, found 3"),
        ({"stages": 1, "first": 4, "last": 4}, "--pipeline-model-parallel-size: .* 2 .*, found 1"),
        ({"stages": 2, "first": 3, "last": 4}, "--num-layers: expected 7 beside .*, found 8"),
        ({"last": 4}, r"--num-layers: .* multiple of 3 more \(3 other stages\), found 8, 4 more"),
        # Megatron takes this one, for -2 is a multiple of 2.
        ({"first": 5, "last": 5}, "--num-layers: .* found 8, -2 more"),
        ({"last": 4, "chunks": 2}, r".*multiple of 6 more \(3 other stages x 2 chunks\)"),
        # Megatron divides by the number of stages between.
        (
            {"stages": 2, "first": 6, "last": 2, "chunks": 2},
            f"{LAST}: expected none beside {FIRST} with two stages of 2 chunks, found 2",
        ),
        ({}, None),
    ],
)
def test_splits_that_leave_layers_over_are_refused(changes, message):
    split = {"stages": 4, **changes}
    if message is None:
        check_stages(8, **split)
        return
    with pytest.raises(ConfigError, match=message):
        check_stages(8, **split)


def test_flags_of_uneven_stages_are_read_as_megatron_reads_them():
    pipeline = [*MODEL, "--pipeline-model-parallel-size", "4"]
    uneven = layout(entry_flags([*pipeline, LAST, "5"]), gpus=8)
    assert uneven.split.layers(32) == [9, 9, 9, 5]
    chunks = [*pipeline, FIRST, "6", LAST, "2", "--num-virtual-stages-per-pipeline-rank", "2"]
    assert layout(entry_flags(chunks), gpus=8).split.layers(32) == [6, 12, 12, 2]
    for words, message in (
        ((LAST, "6"), "--num-layers: expected, .* multiple of 3 more"),
        ((LAST, "5", "--num-layers-per-virtual-pipeline-stage", "1"), "expected --num-virtual-"),
        ((LAST, "-1"), f"{LAST}: expected at least 1, found -1"),
    ):
        with pytest.raises(ConfigError, match=message):
            layout(entry_flags([*pipeline, *words]), gpus=8)


def test_a_stage_keeps_the_activations_of_its_own_layers():
    where = Layout(gpus=4, pp=4, last=1, micro_batch=2, global_batch=16, sequence=16, half=True)
    one = 280 * 2 * 16  # a layer's activations of a microbatch, as in test_plan
    deep = replace(SMALL, layers=10)
    kept = [kept_bytes(deep, where, stage) for stage in range(4)]
    assert kept == [4 * 3 * one, 3 * 3 * one, 2 * 3 * one, one]


def modelled(where: Layout, unlearning: Unlearning | None) -> StepTime:
    sizes = {"gpus_per_node": 8, "utilisation": 1.0}
    return model_step(DEEP, where, unlearning, gpu=GPU, **sizes)


def clocked(where: Layout, unlearning: Unlearning | None) -> float:
    """Seconds of the same step, with the FLOPs of layers and head done by hand."""
    layer = 16 * 2 * (8 * (12 + 2 * 6) + 12 * 8 + 3 * 8 * 20 + 16 * 12)
    head = 16 * 2 * 504 * 8
    counts, forgotten = where.split.layers(24), where.microbatches
    if unlearning is not None:
        forgotten = unlearning.forget_batch // where.data_parallel

    def of_layers(stage: int) -> float:
        return counts[stage] / where.vpp * layer

    def of_head(stage: int, chunk: int) -> float:
        return head if (stage, chunk) == (where.pp - 1, where.vpp - 1) else 0

    return step_seconds(
        stages=where.pp,
        chunks=where.vpp,
        microbatches=where.microbatches,
        # Of a replayed one the reference's logits as well.
        forward=lambda i, c, n: of_layers(i) + of_head(i, c) * (2 if n >= forgotten else 1),
        backward=lambda i, c, n: 2 * (of_layers(i) + of_head(i, c)),
        replayed=where.microbatches - forgotten,
        reference=lambda i, c, n: of_layers(i),
    )


SPLITS = {
    "PP 2": ({"pp": 2}, 1e-9),
    "PP 4": ({"pp": 4}, 1e-9),
    "PP 8": ({"pp": 8}, 1e-9),
    "PP 4, two chunks": ({"pp": 4, "vpp": 2}, 1e-9),
    "PP 4, six chunks": ({"pp": 4, "vpp": 6}, 1e-9),
    "PP 2, the last shorter": ({"pp": 2, "last": 10}, 0.01),
    "PP 4, the last shorter": ({"pp": 4, "last": 3}, 0.01),
    "PP 4, the last longer": ({"pp": 4, "last": 9}, 1e-9),
    "PP 4, both shorter": ({"pp": 4, "first": 4, "last": 2}, 0.03),
    "PP 4, the first longer": ({"pp": 4, "first": 9}, 0.03),
    "PP 4, two chunks, the last shorter": ({"pp": 4, "vpp": 2, "last": 6}, 0.03),
}


@pytest.mark.parametrize("forget", [None, 16, 24])
@pytest.mark.parametrize("name", SPLITS)
def test_a_step_takes_what_a_clock_of_each_stage_says(name, forget):
    """Where the slowest stage is not the last one, it works while others wait: less than the model has."""
    changes, tolerance = SPLITS[name]
    where = replace(ONE, gpus=changes["pp"], micro_batch=1, global_batch=32, **changes)
    unlearning = None if forget is None else Unlearning(forget_batch=forget)
    expected = clocked(where, unlearning)
    assert modelled(where, unlearning).total == pytest.approx(expected, rel=tolerance)


def test_a_reference_costs_no_second_bubble():
    """A model that fills the pipeline anew for it, or in which all fill it like the slowest, is found out."""
    where = replace(ONE, gpus=4, pp=4, micro_batch=1, global_batch=32)
    unlearning = Unlearning(forget_batch=16)
    time, expected = modelled(where, unlearning), clocked(where, unlearning)
    refilled = 3 * 6 * 16 * 2 * (8 * (12 + 2 * 6) + 12 * 8 + 3 * 8 * 20 + 16 * 12)
    assert abs((time.total + refilled) / expected - 1) > 0.01
    like_the_slowest = time.total - time.bubble + 3 * time.compute / where.microbatches
    assert abs(like_the_slowest / expected - 1) > 0.01


# Layers of 1920 FLOPs and a head of 8064, as above.
RANKED = Layout(gpus=8, micro_batch=1, global_batch=64, sequence=16, distributed_optimizer=True)
SIZES = {"gpu": GPU, "gpus_per_node": 8, "utilisation": 1.0}


@pytest.mark.parametrize("layers", [24, 25])
def test_layouts_that_are_listed_are_the_fastest_splits_that_megatron_builds(layers):
    """Each against all splits of its stages, tried one by one."""
    arch, unlearning = replace(DEEP, layers=layers), Unlearning(forget_batch=32)
    uneven = 0
    for one in rank_layouts(arch, RANKED, unlearning, **SIZES):
        split = one.layout.split
        built = megatron_s_layers(layers, split)
        assert sorted(itertools.chain(*built)) == list(range(layers))
        uneven += one.layout.first is not None or one.layout.last is not None
        own = [None, *range(1, layers)]
        best = math.inf
        for first, last in itertools.product(own, own):
            with contextlib.suppress(ConfigError):
                check_stages(layers, split.pp, chunks=split.vpp, first=first, last=last)
                other = replace(one.layout, first=first, last=last)
                best = min(best, model_step(arch, other, unlearning, **SIZES).total)
        assert one.time.total == pytest.approx(best, rel=1e-9), split
    assert uneven > 10


def test_the_flags_of_a_listed_split_give_it_again():
    for split, words in (
        (Split(pp=4), ""),
        (Split(pp=4, vpp=2), ""),
        (Split(pp=4, last=5), f"{LAST} 5"),
        (
            Split(pp=4, vpp=2, first=8, last=4),
            f"{FIRST} 8 {LAST} 4 --num-virtual-stages-per-pipeline-rank 2",
        ),
    ):
        assert split.flags() == words
        given = [*MODEL, "--pipeline-model-parallel-size", "4", *words.split()]
        if words:
            assert layout(entry_flags(given), gpus=8).split == split


def test_uneven_stages_are_told_and_proposed():
    pipeline = ("--pipeline-model-parallel-size", 4, "--micro-batch-size", 1)
    words = ("--gpus", 64, "--rank-layouts", 1000, "--json", "--", *MODEL, *pipeline)
    text = run(*(word for word in words if word != "--json"), LAST, 5).stdout.splitlines()
    assert "ranks: TP 1, PP 4 of 9, 9, 9 and 5 layers, DP 16" in text[1]
    rows = [line.split() for line in text]
    numbers = json.loads(run(*words).stdout)
    assert numbers["stage_layers"] == [8, 8, 8, 8]
    [one] = [
        one
        for one in numbers["layouts"]
        if (one["tp"], one["pp"], one["vpp"], one["micro_batch"]) == (1, 4, 1, 1)
    ]
    assert one["stage_layers"] == [9, 9, 9, 5]
    [row] = [i for i, row in enumerate(rows) if row[:5] == ["1", "4", "1", "16", "1"]]
    assert rows[row + 1] == ["with", LAST, "5"]
    # Without a pipeline there is nothing below.
    [row] = [i for i, row in enumerate(rows) if row[:5] == ["1", "1", "1", "64", "1"]]
    assert rows[row + 1][0] != "with"
