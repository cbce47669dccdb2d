"""What a call of the unlearning head is given, checked, and what follows from it before any product.

T tokens, H hidden size, V vocabulary columns of this shard.
"""

import importlib.util
import os
from collections.abc import Callable
from types import ModuleType
from typing import Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_ext.losses import vocab_parallel
from megatron_ext.losses.head_memory import Blocks
from megatron_ext.losses.head_plan import HeadPlan
from megatron_ext.losses.vocab_parallel import check_labels, shard_columns

Backend = Literal["torch", "triton"] | ModuleType


class HeadInputs(NamedTuple):
    """The arguments of the head's autograd functions, in their order.

    Attributes:
        hidden: `[T, H]`, or `[T / tp, H]` under sequence parallelism.
        weight: `[V, H]`.
        labels: `[T]`.
        order: `[T]`, tokens with a reference first; None: as they are.
        reference_hidden: like `hidden`; None without a token that has a reference.
        reference_weight: `[V, H']`, or None.
        plan: all that was decided.
    """

    hidden: Tensor
    weight: Tensor
    labels: Tensor
    order: Tensor | None
    reference_hidden: Tensor | None
    reference_weight: Tensor | None
    plan: HeadPlan


def prepare(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    roles: Tensor,
    *,
    reference_hidden: Tensor | None,
    reference_weight: Tensor | None,
    tp_group: dist.ProcessGroup | None,
    sequence_parallel: bool,
    vocab_size: int | None,
    fp32_logits: bool,
    fuse_weight_gradient: bool,
    backend: Backend | None,
    blocks: Callable[[int, int], Blocks],
) -> HeadInputs:
    """Checks and sorts; arguments and errors as those of `unlearning_head`.

    But for `blocks`: what of the logits exists at a time, from the number of tokens that have a
    reference and the bytes of a logit.
    """
    tp = dist.get_world_size(tp_group) if tp_group else 1
    _check(hidden, weight, labels, roles, tp, sequence_parallel)
    _check_reference(hidden, weight, reference_hidden, reference_weight)
    start, valid = shard_columns(weight.shape[0], vocab_size=vocab_size, group=tp_group)
    if not labels.is_cuda:
        check_labels(labels, vocab_size=_real(weight, tp, vocab_size))
    replay = roles == 1
    references = 0 if reference_hidden is None else int(replay.sum())
    order = None
    if 0 < references < labels.shape[0]:
        order = torch.argsort(replay, descending=True, stable=True).to(hidden.device)
    plan = HeadPlan(
        kernels=_kernels(backend, hidden),
        group=tp_group if tp > 1 else None,
        sequence_parallel=sequence_parallel,
        vocab_start=start,
        valid_columns=valid,
        references=references,
        blocks=blocks(references, 4 if fp32_logits else weight.element_size()),
        fp32_logits=fp32_logits,
        fuse_weight_gradient=fuse_weight_gradient and hasattr(weight, "main_grad"),
        keep=torch.is_grad_enabled(),
    )
    reference: tuple[Tensor | None, Tensor | None] = (None, None)
    if references and reference_hidden is not None and reference_weight is not None:
        reference = (reference_hidden.detach(), reference_weight.detach())
    return HeadInputs(hidden, weight, labels, order, *reference, plan)


def check_cuda_labels(inputs: HeadInputs, vocab_size: int | None) -> None:
    """Refuses bad labels on a GPU, behind the products: a bad label reads nothing that is not there."""
    if inputs.labels.is_cuda:
        group = inputs.plan.group
        real = _real(inputs.weight, 1 if group is None else group.size(), vocab_size)
        check_labels(inputs.labels, vocab_size=real)


def _real(weight: Tensor, tp: int, vocab_size: int | None) -> int:
    """Columns over all shards that are not padding."""
    return weight.shape[0] * tp if vocab_size is None else vocab_size


def _kernels(backend: Backend | None, hidden: Tensor) -> ModuleType:
    """The module whose statistics and gradients are used."""
    if backend is None:
        # Triton's kernels compute in fp32; fp64 hidden states ask for more.
        usable = hidden.is_cuda and hidden.dtype != torch.float64
        backend = "triton" if usable and importlib.util.find_spec("triton") else "torch"
    if backend == "torch":
        return vocab_parallel
    if backend != "triton" and not isinstance(backend, ModuleType):
        raise ValueError(
            f"backend must be 'torch', 'triton', a module with their functions or None, got {backend!r}"
        )
    if not hidden.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError(
            f"backend {backend!r} needs CUDA tensors (or TRITON_INTERPRET=1), got {hidden.device}"
        )
    if hidden.dtype == torch.float64:
        raise TypeError(f"backend {backend!r} computes in fp32; for float64 use backend 'torch'")
    if isinstance(backend, ModuleType):
        return backend
    from megatron_ext.losses import head_triton  # only here: Triton is optional

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
