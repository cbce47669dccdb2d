"""Attention within documents in Transformer Engine's layers, with a stand-in for its attention."""

from types import SimpleNamespace

import megatron.core.extensions.transformer_engine as extension
import pytest
import torch
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

from megatron_ext.exceptions import ConfigError
from megatron_ext.model import te_documents
from megatron_ext.model.attention import SdpaCoreAttention
from megatron_ext.model.documents import Documents
from megatron_ext.model.te_documents import WithinDocuments, within_documents
from tests.helpers.attention import core_attention
from tests.helpers.thd import ACROSS, ThdAttention

LENGTH, HEADS, GROUPS, SIZE = 24, 6, 2, 8
ENDS = ([1, 2, 9, 24], [24], [7, 23, 24])


class Within(WithinDocuments, ThdAttention):
    """As with Megatron's module."""


@pytest.fixture
def documents():
    def of(samples):
        rows = torch.full((samples, LENGTH + 1), LENGTH, dtype=torch.int32)
        rows[:, 0] = 0
        for row, own in zip(rows, ENDS, strict=False):
            row[1 : len(own) + 1] = torch.tensor(own)
        return Documents.from_lengths(rows)

    return of


def _results(attention, samples, documents):
    generator = torch.Generator().manual_seed(1)
    inputs = [
        torch.randn(LENGTH, samples, heads, SIZE, generator=generator, dtype=torch.float64)
        for heads in (HEADS, GROUPS, GROUPS)
    ]
    inputs = [t.requires_grad_() for t in inputs]
    causal = AttnMaskType.causal
    context = attention(*inputs, None, attn_mask_type=causal, packed_seq_params=documents)
    towards = torch.randn(context.shape, generator=generator, dtype=torch.float64)
    return [context, *torch.autograd.grad(context, inputs, towards)]


@pytest.mark.parametrize("samples", [1, 3])
def test_context_and_gradients_are_those_of_the_torch_native_attention(documents, samples):
    attention = Within()
    found = _results(attention, samples, documents(samples))
    expected = _results(core_attention(), samples, documents(samples))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
    assert found[0].is_contiguous()
    lengths = [1, 1, 7, 15, 24, 7, 16, 1]
    assert attention.seen == [lengths[:4] if samples == 1 else lengths]


def test_documents_are_told_to_the_device_once_for_all_layers(documents):
    several = documents(3)
    assert several.packed(torch.device("cpu")) is several.packed(torch.device("cpu"))


def test_without_documents_it_is_as_before(documents):
    attention = Within()
    context, *_ = _results(attention, 3, None)
    torch.testing.assert_close(context, _results(core_attention(), 3, None)[0])
    assert attention.seen == [ACROSS]


def test_packed_sequences_of_megatron_reach_its_module_as_they_are():
    class Parent:
        def forward(self, *args, **options):
            return args, options

    class Layer(WithinDocuments, Parent):
        pass

    own = PackedSeqParams(qkv_format="thd")
    given = ("query", "key", "value", None, AttnMaskType.causal)
    args, options = Layer().forward(*given, packed_seq_params=own, num_splits=1)
    assert args == given
    assert options == {"attention_bias": None, "packed_seq_params": own, "num_splits": 1}


@pytest.fixture
def transformer_engine(monkeypatch):
    """Megatron's layers, of which the stand-in is Transformer Engine's attention."""
    te_documents._te_core_attention.cache_clear()
    monkeypatch.setattr(extension, "TEDotProductAttention", ThdAttention)

    def layer(attention=ThdAttention):
        spec = get_gpt_layer_local_spec()
        spec.submodules.self_attention.submodules.core_attention = attention
        return spec

    yield layer
    te_documents._te_core_attention.cache_clear()


def _core(spec):
    return spec.submodules.self_attention.submodules.core_attention


def test_a_layer_gets_the_attention_within_documents(transformer_engine):
    before = transformer_engine()
    after = _core(within_documents(before, SimpleNamespace(context_parallel_size=1)))
    assert issubclass(after, WithinDocuments)
    assert issubclass(after, ThdAttention)
    assert _core(before) is ThdAttention


def test_over_context_parallel_ranks_it_is_the_torch_native_one(transformer_engine):
    over = SimpleNamespace(context_parallel_size=2)
    assert _core(within_documents(transformer_engine(), over)) is SdpaCoreAttention


def test_all_layers_of_a_block_get_it(transformer_engine):
    one, other = transformer_engine(), transformer_engine()
    block = TransformerBlockSubmodules(layer_specs=[one, other, one])
    found = within_documents(block, SimpleNamespace(context_parallel_size=1))
    assert len(found.layer_specs) == 3
    assert all(issubclass(_core(layer), WithinDocuments) for layer in found.layer_specs)
    empty = TransformerBlockSubmodules(layer_specs=[])
    config = SimpleNamespace(context_parallel_size=1)
    assert within_documents(empty, config).layer_specs == []


def test_layers_with_another_attention_are_refused(transformer_engine):
    with pytest.raises(ConfigError, match=r"document-masking: .*found DotProductAttention"):
        within_documents(
            transformer_engine(DotProductAttention), SimpleNamespace(context_parallel_size=1)
        )
