"""The plan against the product and Megatron: padding, FLOPs, and what the head keeps."""

from argparse import Namespace
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from megatron_ext.losses import blocks, head_memory
from megatron_ext.planning import head
from megatron_ext.planning.layout import Unlearning
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


def test_the_head_s_numbers_are_those_of_a_run():
    names = ("CPU_BUDGET", "CPU_LOSS_SHARE", "LOSS_SHARE", "TILE")
    assert [getattr(head, n) for n in names] == [getattr(head_memory, n) for n in names]
    assert blocks.BLOCK_ELEMENTS["cpu"] == head.CPU_ELEMENTS


@pytest.mark.parametrize("unlearning", [None, Unlearning(forget_batch=4)], ids=["plain", "unlearn"])
@pytest.mark.parametrize("cpu", [True, False], ids=["cpu", "gpu"])
@pytest.mark.parametrize("micro_batch", [1, 2, 7])
@pytest.mark.parametrize("sequence", [16, 1000, 8192])
def test_the_head_s_chunks_are_those_of_a_run(sequence, micro_batch, cpu, unlearning, monkeypatch):
    sizes = {"micro_batch": micro_batch, "global_batch": 56, "sequence": sequence}
    layout = replace(ONE, **sizes, cpu=cpu, half=not cpu)
    gpu = SimpleNamespace(total_memory=40 * 2**30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: gpu)
    columns, both = PAPER.padded_vocab(1), 1 if unlearning is None else 2
    chunk = head_memory.loss_chunk(
        layout.tokens,
        columns,
        PAPER.hidden,
        layout.tokens * (both - 1),
        element_size=layout.element,
        gradient_size=4,
        device=torch.device("cpu" if cpu else "cuda"),
    )
    planned = head.head_logits(PAPER, layout, unlearning, capacity=gpu.total_memory)
    assert planned.logits == min(chunk, layout.tokens) * both * columns * layout.element
