"""Attention within documents, against the same with a mask over all pairs of tokens."""

from contextlib import nullcontext
from functools import partial

import megatron.training.training as loop
import pytest
import torch
from megatron.core.transformer.enums import AttnBackend
from torch.nn import functional

from megatron_ext.data.batch import MicroBatch, count_pairs
from megatron_ext.model import attention as module
from megatron_ext.model.documents import Documents, Spans, attend_within, has_flash
from tests.helpers import flash
from tests.helpers.attention import core_attention

LENGTH, HEADS, GROUPS, SIZE = 24, 6, 2, 8
# Documents of one token, of all tokens, and of some.
ENDS = ([1, 2, 9, 24], [24], [7, 23, 24])


def _lengths(ends=ENDS):
    """As Megatron's datasets give them, in a microbatch."""
    rows = torch.full((len(ends), LENGTH + 1), LENGTH, dtype=torch.int32)
    rows[:, 0] = 0
    for row, own in zip(rows, ends, strict=True):
        row[1 : len(own) + 1] = torch.tensor(own)
    return rows


def _tensors(dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    shapes = [(LENGTH, len(ENDS), heads, SIZE) for heads in (HEADS, GROUPS, GROUPS, HEADS)]
    return [
        torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes
    ]


def _masked(query, key, value):
    """Of all queries, `[s, b, h, d]`."""
    document = torch.stack(
        [torch.bucketize(torch.arange(LENGTH), torch.tensor(e), right=True) for e in ENDS]
    )
    mask = (document[:, None, :, None] == document[:, None, None]).tril()
    parts = (t.permute(1, 2, 0, 3) for t in (query, key, value))
    context = functional.scaled_dot_product_attention(*parts, attn_mask=mask, enable_gqa=True)
    return context.permute(2, 0, 1, 3)


def _with_gradients(attend, tensors):
    inputs = [t.detach().clone().requires_grad_() for t in tensors[:3]]
    context = attend(*inputs)
    return [context, *torch.autograd.grad(context, inputs, tensors[3].reshape(context.shape))]


def test_context_and_gradients_are_those_of_a_mask():
    tensors, documents = _tensors(), Documents.from_lengths(_lengths())
    expected = _with_gradients(_masked, tensors)
    found = _with_gradients(partial(core_attention(), packed_seq_params=documents), tensors)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other.reshape(one.shape), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("first", [0, 8, 23])
def test_the_flash_kernel_gets_documents_that_give_the_same(first):
    """Also for queries that are the last of the keys, as context-parallel ranks have them."""
    tensors, documents = _tensors(torch.bfloat16), Documents.from_lengths(_lengths())
    tensors = [tensors[0][first:], *tensors[1:3], tensors[3][first:]]
    exact = [t.double() for t in tensors]

    def masked(query, key, value):
        whole = torch.cat((torch.zeros(first, *query.shape[1:]), query))
        return _masked(whole.double(), key, value)[first:]

    def never(*_):
        raise AssertionError("not by the flash kernel")

    options = {"documents": documents, "attend": never, "flash": True, "scale": None}
    with flash.on_cpu():
        found = _with_gradients(partial(attend_within, **options), tensors)
    expected = _with_gradients(masked, exact)
    for one, other in zip(found, expected, strict=True):
        # bf16 keeps 4e-3 of a number; those of GQA are sums of three such.
        torch.testing.assert_close(one.double(), other, rtol=2**-7, atol=2**-7)


@pytest.mark.parametrize(
    ("dtype", "size", "dropout", "backend", "takes"),
    [
        (torch.bfloat16, 64, 0.0, AttnBackend.auto, True),
        (torch.bfloat16, 100, 0.0, AttnBackend.auto, False),
        (torch.float16, 256, 0.0, AttnBackend.fused, True),
        (torch.float32, 64, 0.0, AttnBackend.auto, False),
        (torch.bfloat16, 288, 0.0, AttnBackend.auto, False),
        (torch.bfloat16, 64, 0.1, AttnBackend.auto, False),
        (torch.bfloat16, 64, 0.0, AttnBackend.unfused, False),
    ],
)
def test_a_gpu_uses_the_flash_kernel_where_it_has_one(
    dtype, size, dropout, backend, takes, monkeypatch
):
    query = torch.empty(1, 1, 1, size, dtype=dtype)
    assert not has_flash(query, dropout=dropout, backend=backend)  # no GPU

    class OnGpu(torch.Tensor):
        is_cuda = True

    for capability in ((7, 5), (8, 0), (9, 0)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, c=capability: c)
        found = has_flash(query.as_subclass(OnGpu), dropout=dropout, backend=backend)
        assert found == (takes and capability >= (8, 0))


@pytest.mark.parametrize(
    ("backend", "within", "across"),
    [
        (AttnBackend.auto, AttnBackend.flash, AttnBackend.auto),
        (AttnBackend.fused, AttnBackend.flash, AttnBackend.fused),
        (AttnBackend.unfused, AttnBackend.unfused, AttnBackend.unfused),
    ],
)
def test_documents_one_by_one_are_not_for_cudnn(backend, within, across, monkeypatch):
    """It plans each length anew, forward and backward."""

    class OnGpu(torch.Tensor):
        is_cuda = True

    asked = []
    monkeypatch.setattr(module, "_gpu_backends", lambda device, chosen: asked.append(chosen) or ())
    monkeypatch.setattr(module, "only", lambda _: nullcontext())
    tensors = [t.as_subclass(OnGpu) for t in _tensors(torch.float32)[:3]]
    for documents in (Documents.from_lengths(_lengths()), None):
        core_attention(backend)(*tensors, packed_seq_params=documents)
    assert asked == [within, across]


def test_documents_are_those_of_the_samples():
    documents = Documents.from_lengths(_lengths())
    assert documents.bounds == tuple((0, *ends) for ends in ENDS)
    assert documents.joined().tolist() == [0, 1, 2, 9, 24, 48, 55, 71, 72]
    assert documents.joined().dtype == torch.int32
    # Megatron reads this as how many rotary angles are needed.
    assert (documents.max_seqlen_q, documents.max_seqlen_kv, documents.qkv_format) == (
        24,
        24,
        "sbhd",
    )
    assert documents.spans(0, 2, 12) == Spans(2, (7, 3), (7, 3))
    assert documents.spans(0, 1, 2) == Spans(1, (1,), (1,))
    spans = documents.spans(0, 4, 12)
    assert spans == Spans(2, (5, 3), (7, 3))
    assert documents.spans(0, 4, 12) is spans
    ends = documents.ends(spans, torch.device("cpu"))
    assert [row.tolist() for row in ends] == [[0, 5, 8], [0, 7, 10]]
    assert all(row.dtype == torch.int32 for row in ends)
    assert documents.ends(spans, torch.device("cpu")) is ends


@pytest.mark.parametrize("row", [[0, 3, 9], [1, 5, LENGTH]])
def test_documents_that_are_not_whole_samples_are_no_documents(row):
    with pytest.raises(AssertionError, match="whole samples"):
        Documents.from_lengths(torch.tensor([row + [row[-1]] * (LENGTH - 2)], dtype=torch.int32))


def test_operations_are_counted_by_pairs_of_tokens_within_documents(monkeypatch):
    monkeypatch.setattr(loop, "_seqlen_stats_active", False)
    monkeypatch.setattr(loop, "_seqlen_stats_in_iteration", None)
    count_pairs([MicroBatch()])
    assert loop.consume_seqlen_stats_in_iteration() == (None, None)
    count_pairs(2 * [MicroBatch(documents=Documents.from_lengths(_lengths()))])
    squares = 1 + 1 + 49 + 225 + 576 + 49 + 256 + 1
    assert loop.consume_seqlen_stats_in_iteration() == (2 * 72, 2 * squares)


def test_documents_of_another_microbatch_are_found_out():
    documents = Documents.from_lengths(_lengths()[:1])
    with pytest.raises(AssertionError, match="as many samples"):
        core_attention()(*_tensors()[:3], packed_seq_params=documents)
