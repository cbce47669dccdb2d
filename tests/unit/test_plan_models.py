"""The plan against Megatron: parameters, padding, kept activations and FLOPs of real models."""

from argparse import Namespace
from dataclasses import replace
from types import SimpleNamespace

import pytest

from megatron_ext.analysis.plan import Architecture, activation_bytes_per_token, step_flops
from tests.helpers import models
from tests.helpers.distributed import run_ranks
from tests.unit.test_plan import ONE, PAPER, SMALL


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
