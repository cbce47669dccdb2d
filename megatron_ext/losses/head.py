"""The fused unlearning head: from hidden states to the margin and reference KL of every token.

Legend: T tokens, H hidden size, V vocabulary columns of this tensor-parallel shard, tp shards, R
tokens with a reference (role +1).

Logits exist for a block of tokens and columns only. What a block leaves behind is five numbers a token, which
are joined with those of the other blocks; one all-gather, after the last block, joins the shards (see
`vocab_parallel`, whose mathematics and precision hold here). Because the collective does not depend on
the blocks, each rank may choose them from its own memory.

Tokens with a reference are sorted to the front: the reference logits of R tokens are then one
matrix product, the others cost nothing, and no kernel looks up rows.

If they fit in memory all logits are kept for the backward pass, where the gradient overwrites them.
Otherwise backward makes them again, block by block, but for those of the block that forward made
last: they are there already. `head_memory` chooses, between the two also to keep the student's
logits but not the reference's.
"""

import importlib.util
import os
from types import ModuleType
from typing import Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_ext.losses import vocab_parallel
from megatron_ext.losses.head_function import HeadPlan, UnlearningHeadFunction
from megatron_ext.losses.head_memory import CPU_BLOCK, Blocks, memory_budget, plan_blocks
from megatron_ext.losses.vocab_parallel import check_labels, shard_columns

Backend = Literal["torch", "triton", "triton-candidate"]


class HeadOutput(NamedTuple):
    """What the objectives are made of, for every token.

    Attributes:
        margin: `[T]` fp32, the log-odds of the label.
        kl: `[T]` fp32, `KL(p_reference || p)` in nats; 0 where the role is not +1 or no reference
            was given.
    """

    margin: Tensor
    kl: Tensor


def unlearning_head(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    roles: Tensor,
    *,
    reference_hidden: Tensor | None = None,
    reference_weight: Tensor | None = None,
    tp_group: dist.ProcessGroup | None = None,
    sequence_parallel: bool = False,
    vocab_size: int | None = None,
    chunk_size: int | None = None,
    memory_budget_bytes: int | None = None,
    fp32_logits: bool = False,
    fuse_weight_gradient: bool = False,
    backend: Backend | None = None,
) -> HeadOutput:
    """Margin and reference KL of every token, without the logits of the whole batch.

    Differentiable (once) in `hidden` and `weight`, never in the reference. Communication: one
    all-gather of statistics a call, and the reduction of the gradient of `hidden` in backward; with
    `sequence_parallel` also the all-gather of the hidden states, which are then kept.

    Args:
        hidden: `[T, H]`; with `sequence_parallel` `[T / tp, H]`, this rank's slice of the tokens.
        weight: `[V, H]`, this rank's vocabulary shard; the type of `hidden`.
        labels: `[T]` integers, global ids, valid at every position, the same on all ranks.
        roles: `[T]` of -1 (forget), 0 (ignore), +1 (replay), the same on all ranks. A role decides
            whether a reference is computed, nothing else: every token gets its margin.
        reference_hidden: Final hidden states of the reference, a row for each row of `hidden`; rows
            whose role is not +1 are not read. Its own width is allowed. None: no KL.
        reference_weight: `[V, H']`; needed with `reference_hidden`.
        tp_group: Ranks that hold the vocabulary shards, in order; None if the weight is whole.
        sequence_parallel: Hidden states are split over `tp_group` along the tokens.
        vocab_size: Real columns over all shards; the columns from there on are padding.
        chunk_size: Tokens whose logits exist at a time, a strict bound: if it is less than T, none
            but one chunk's are kept, and backward makes the others again. None chooses from memory.
        memory_budget_bytes: What logits may take; None: most of the device's free memory, a fixed
            small amount on a CPU. Not used with `chunk_size`.
        fp32_logits: Leave the logits unrounded. bf16 logits carry a noise of 2^-9 of their size,
            which drowns a KL below about 1e-4 and its gradient. Costs twice the memory traffic.
        fuse_weight_gradient: Add the gradient of `weight` to `weight.main_grad`, as Megatron's
            gradient-accumulation fusion does, where the parameter has one.
        backend: Who computes statistics and gradients of the logits; None: Triton on CUDA where it
            is installed, else torch.

    Returns:
        Margin and KL, `[T]` fp32 each, the same on all ranks.

    Raises:
        TypeError: Types that are not floating point, or differ between hidden and weight.
        ValueError: Shapes, labels (on CUDA a device-side assertion), `vocab_size` or options that
            do not fit.
    """
    tp = dist.get_world_size(tp_group) if tp_group else 1
    _check(hidden, weight, labels, roles, tp, sequence_parallel)
    _check_reference(hidden, weight, reference_hidden, reference_weight)
    start, valid = shard_columns(weight.shape[0], vocab_size=vocab_size, group=tp_group)
    vocab = weight.shape[0] * tp if vocab_size is None else vocab_size
    if not labels.is_cuda:
        check_labels(labels, vocab_size=vocab)
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size must be positive, got {chunk_size}")
    tokens = labels.shape[0]
    replay = roles == 1
    references = 0 if reference_hidden is None else int(replay.sum())
    order = None
    if 0 < references < tokens:
        order = torch.argsort(replay, descending=True, stable=True).to(hidden.device)
    element = 4 if fp32_logits else weight.element_size()
    if chunk_size is not None:
        blocks = Blocks(chunk_size, weight.shape[0], chunk_size >= tokens)
    else:
        block = None
        if memory_budget_bytes is None:
            needed = (tokens + references) * weight.shape[0] * element
            memory_budget_bytes = memory_budget(weight.device, needed=needed)
            block = None if weight.is_cuda else CPU_BLOCK
        blocks = plan_blocks(
            tokens,
            weight.shape[0],
            references,
            element_size=element,
            budget=memory_budget_bytes,
            block=block,
        )
    plan = HeadPlan(
        kernels=_kernels(backend, hidden),
        group=tp_group if tp > 1 else None,
        sequence_parallel=sequence_parallel,
        vocab_start=start,
        valid_columns=valid,
        references=references,
        blocks=blocks,
        fp32_logits=fp32_logits,
        fuse_weight_gradient=fuse_weight_gradient and hasattr(weight, "main_grad"),
        keep=torch.is_grad_enabled(),
    )
    margin, kl = UnlearningHeadFunction.apply(
        hidden,
        weight,
        labels,
        order,
        reference_hidden.detach() if reference_hidden is not None and references else None,
        reference_weight.detach() if reference_weight is not None and references else None,
        plan,
    )
    if labels.is_cuda:  # behind the products: a bad label reads nothing that is not there
        check_labels(labels, vocab_size=vocab)
    return HeadOutput(margin, kl)


def _kernels(backend: Backend | None, hidden: Tensor) -> ModuleType:
    """The module whose statistics and gradients are used."""
    if backend is None:
        # Triton's kernels compute in fp32; fp64 hidden states ask for more.
        usable = hidden.is_cuda and hidden.dtype != torch.float64
        backend = "triton" if usable and importlib.util.find_spec("triton") else "torch"
    if backend == "torch":
        return vocab_parallel
    if backend not in ("triton", "triton-candidate"):
        raise ValueError(
            f"backend must be 'torch', 'triton', 'triton-candidate' or None, got {backend!r}"
        )
    if not hidden.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError(
            f"backend {backend!r} needs CUDA tensors (or TRITON_INTERPRET=1), got {hidden.device}"
        )
    if hidden.dtype == torch.float64:
        raise TypeError(f"backend {backend!r} computes in fp32; for float64 use backend 'torch'")
    # Only here: Triton is optional.
    if backend == "triton-candidate":
        from megatron_ext.losses import head_candidate

        return head_candidate
    from megatron_ext.losses import head_triton

    return head_triton


def _check(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    roles: Tensor,
    tp: int,
    sequence_parallel: bool,
) -> None:
    """Refuses types and shapes that do not fit."""
    if not hidden.is_floating_point() or hidden.dtype != weight.dtype:
        raise TypeError(
            f"hidden and weight must have one floating-point type, "
            f"got {hidden.dtype} and {weight.dtype}"
        )
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            f"expected hidden [T, H] and weight [V, H], "
            f"got {tuple(hidden.shape)} and {tuple(weight.shape)}"
        )
    tokens = hidden.shape[0] * (tp if sequence_parallel else 1)
    for name, tensor in (("labels", labels), ("roles", roles)):
        if tensor.shape != (tokens,):
            raise ValueError(f"{name} must have shape ({tokens},), got {tuple(tensor.shape)}")


def _check_reference(
    hidden: Tensor,
    weight: Tensor,
    reference_hidden: Tensor | None,
    reference_weight: Tensor | None,
) -> None:
    """Refuses half a reference, or one of another shape."""
    if (reference_hidden is None) != (reference_weight is None):
        raise ValueError("reference_hidden and reference_weight must be given together")
    if reference_hidden is None or reference_weight is None:
        return
    expected = [
        (hidden.shape[0], reference_hidden.shape[-1]),
        (weight.shape[0], reference_hidden.shape[-1]),
    ]
    found = [tuple(reference_hidden.shape), tuple(reference_weight.shape)]
    if found != expected:
        raise ValueError(
            f"expected reference_hidden and reference_weight of shapes {expected[0]} and "
            f"{expected[1]}, got {found[0]} and {found[1]}"
        )
    if reference_hidden.dtype != reference_weight.dtype:
        raise TypeError(
            f"reference_hidden and reference_weight must have one type, "
            f"got {reference_hidden.dtype} and {reference_weight.dtype}"
        )
