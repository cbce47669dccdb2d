"""A microbatch on this rank: read once, used by the reference's pass and by the step itself."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.utils import get_batch_on_this_cp_rank, get_batch_on_this_tp_rank
from megatron.training.utils import is_first_or_last_pipeline_stage

from megatron_ext.exceptions import DataError
from megatron_ext.model.documents import Documents

_KEYS = ("tokens", "labels", "loss_mask", "position_ids", "attention_mask")


@dataclass
class StepContext:
    """What a microbatch needs to know of its step.

    Attributes:
        tokens: fp64 ``[2]``, forgotten and replayed tokens of the whole global batch.
        scale: what Megatron will divide the loss by on its way to the gradient: microbatches times
            data-parallel ranks.
        reference_hidden: the reference's final hidden states, ``[s, b, H]``, with sequence parallelism
            ``[s / TP, b, H]``; ``None`` without a reference or for a forget microbatch.
    """

    tokens: torch.Tensor
    scale: float
    reference_hidden: torch.Tensor | None = None


@dataclass
class MicroBatch:
    """One microbatch; every tensor is ``None`` on a pipeline stage that does not use it.

    Shapes: ``b`` sequences of the microbatch, ``s`` tokens of a sequence on this context-parallel rank.

    Attributes:
        tokens: int64 ``[b, s]``, on the first stage.
        position_ids: int64 ``[b, s]``, on the first stage.
        labels: int64 ``[b, s]``, on the last stage.
        loss_mask: float ``[b, s]``, on the last stage; its sign is the role of the token.
        attention_mask: bool ``[b, 1, s, s]`` if the loader builds one.
        sources: where each of the ``b`` samples comes from; ``None`` on ranks that receive the batch from
            another.
        datasets: prefixes of the datasets that the ``b`` samples are from; ``None`` where ``sources`` is.
        forget: the role of the samples, where it was asked for.
        documents: of the samples, where attention is within documents; on every stage.
        context: what the step attaches for the head of the last stage.
    """

    tokens: torch.Tensor | None = None
    labels: torch.Tensor | None = None
    loss_mask: torch.Tensor | None = None
    position_ids: torch.Tensor | None = None
    attention_mask: torch.Tensor | None = None
    sources: list[str] | None = None
    datasets: list[str] | None = None
    forget: bool | None = None
    documents: Documents | None = None
    context: StepContext | None = field(default=None, repr=False)


def read_micro_batch(
    data_iterator: Iterator[dict[str, torch.Tensor]] | None,
    *,
    args: Namespace,
    vp_stage: int | None,
    micro_batch_size: int,
    forget: bool | None = None,
) -> MicroBatch:
    """Read a microbatch from Megatron's loader and share it over the tensor-parallel ranks.

    Args:
        data_iterator: Megatron's iterator; ``None`` on ranks that receive the batch from another.
        args: Megatron's validated arguments.
        vp_stage: virtual pipeline stage of the model chunk, ``None`` without interleaving.
        micro_batch_size: sequences of the microbatch.
        forget: the role that the samples must have; not checked if ``None``.

    Raises:
        DataError: the samples have another role than the composition of the batch says.
    """
    uses_tokens = is_first_or_last_pipeline_stage(vp_stage)
    if not uses_tokens and not args.dataloader_inter_document_masking:
        return MicroBatch()
    tp_rank = parallel_state.get_tensor_model_parallel_rank()
    batch: dict[str, Any] = {}
    sources: list[str] | None = None
    datasets: list[str] | None = None
    sample: dict[str, Any] = {}
    if tp_rank == 0:
        assert data_iterator is not None
        sample = next(data_iterator)
        sources, datasets = sample.get("source"), sample.get("dataset")
        if forget is not None:
            _check_role(sample["loss_mask"], forget)
        batch = {
            key: sample[key].cuda(non_blocking=True) if sample.get(key) is not None else None
            for key in (_KEYS if uses_tokens else ())
        }
    documents = None
    if args.dataloader_inter_document_masking:
        documents = _share_documents(sample.get("cu_seqlens"), micro_batch_size, args.seq_length)
        if not uses_tokens:
            return MicroBatch(
                sources=sources, datasets=datasets, forget=forget, documents=documents
            )
    ignore_virtual = vp_stage is None
    batch = get_batch_on_this_tp_rank(
        batch,
        has_cu_seqlens=False,
        is_hybrid_cp=False,
        create_attention_mask_in_dataloader=args.create_attention_mask_in_dataloader,
        broadcast_src_rank=parallel_state.get_tensor_model_parallel_src_rank(),
        broadcast_group=parallel_state.get_tensor_model_parallel_group(),
        cp_size=args.context_parallel_size,
        tp_rank=tp_rank,
        micro_batch_size=micro_batch_size,
        seq_length=args.seq_length,
        mtp_on_this_rank=False,
        pipeline_model_parallel_size=args.pipeline_model_parallel_size,
        is_pipeline_first_stage=parallel_state.is_pipeline_first_stage(
            ignore_virtual=ignore_virtual, vp_stage=vp_stage
        ),
        is_pipeline_last_stage=parallel_state.is_pipeline_last_stage(
            ignore_virtual=ignore_virtual, vp_stage=vp_stage
        ),
    )
    batch = get_batch_on_this_cp_rank(
        batch, is_hybrid_cp=False, cp_group=parallel_state.get_context_parallel_group()
    )
    tensors = {key: batch.get(key) for key in _KEYS}
    return MicroBatch(
        **tensors, sources=sources, datasets=datasets, forget=forget, documents=documents
    )


def count_pairs(batches: Sequence[MicroBatch]) -> None:
    """Have Megatron's TFLOP/s of this step count attention within documents, where it is that.

    Every rank counts each microbatch that it trains on, once.
    """
    from megatron.training.training import update_seqlen_stats_from_cu_seqlens

    for documents in (batch.documents for batch in batches):
        if documents is None:
            return
        ends = documents.joined()
        if torch.cuda.is_available():  # or the host waits for the device to take it
            ends = ends.pin_memory().cuda(non_blocking=True)
        update_seqlen_stats_from_cu_seqlens(ends)


def _share_documents(cu_seqlens: torch.Tensor | None, samples: int, length: int) -> Documents:
    """Documents on every tensor-parallel rank; each launches kernels by them, so the host waits for them.

    Args:
        cu_seqlens: int32 ``[samples, length + 1]`` on the host of the first rank.
        samples: of the microbatch.
        length: tokens of a sample.
    """
    group = parallel_state.get_tensor_model_parallel_group()
    if group.size() > 1:
        shape = samples, length + 1
        device = torch.cuda.current_device()
        shared = torch.empty(shape, dtype=torch.int32, device=device)
        if cu_seqlens is not None:
            shared.copy_(cu_seqlens, non_blocking=True)  # the loader pins it
        source = parallel_state.get_tensor_model_parallel_src_rank()
        torch.distributed.broadcast(shared, source, group=group)
        cu_seqlens = shared.cpu() if cu_seqlens is None else cu_seqlens
    assert cu_seqlens is not None
    return Documents.from_lengths(cu_seqlens)


def _check_role(loss_mask: torch.Tensor, forget: bool) -> None:
    """A microbatch has one role; a token of the other would be trained the wrong way round."""
    wrong = loss_mask > 0 if forget else loss_mask < 0
    if bool(wrong.any()):
        role = "forgotten" if forget else "replayed"
        raise DataError(
            f"data: expected a microbatch of {role} samples, found {int(wrong.sum())} tokens of the other "
            "role; the loader does not follow the composition of the batch"
        )
