"""The plan against the product and Megatron: padding, FLOPs, and what the head keeps."""

from argparse import Namespace
from dataclasses import replace
from types import SimpleNamespace

import pytest

from megatron_ext.losses import blocks
from megatron_ext.planning import head
from megatron_ext.planning.mixture import Mixture
from megatron_ext.planning.steps import step_flops
from tests.unit.test_plan import ONE, PAPER


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


class _Unset(SimpleNamespace):
    """Megatron's arguments, with None for all that are not given."""

    def __getattr__(self, name):
        return None


MIXED = Mixture(layers=(False,) + (True,) * 31, experts=64, topk=6, ffn=1408, shared=2816)


def _experts(mixture: Mixture | None) -> dict[str, object]:
    if mixture is None:
        return {}
    return {
        "num_experts": mixture.experts,
        "moe_router_topk": mixture.topk,
        "moe_ffn_hidden_size": mixture.ffn,
        "moe_shared_expert_intermediate_size": mixture.shared,
        "moe_layer_freq": [int(one) for one in mixture.layers],
    }


@pytest.mark.parametrize(
    "arch",
    [PAPER, replace(PAPER, query_groups=8, tied=True), replace(PAPER, mixture=MIXED)],
    ids=["dense", "grouped queries", "mixture"],
)
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
        **_experts(arch.mixture),
    )
    layout = replace(ONE, sequence=4096)
    reported = num_floating_point_operations(args, layout.global_batch)
    assert step_flops(arch, layout) == pytest.approx(reported, rel=1e-12)


def test_the_head_s_temporaries_are_those_of_a_run():
    assert blocks.BLOCK_ELEMENTS["cpu"] == head.CPU_ELEMENTS
