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

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_ext.losses.head_function import UnlearningHeadFunction
from megatron_ext.losses.head_inputs import Backend, check_cuda_labels, prepare
from megatron_ext.losses.head_memory import CPU_BLOCK, Blocks, memory_budget, plan_blocks


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
            is installed, else torch. Also a module of kernels with the functions of `head_triton`.

    Returns:
        Margin and KL, `[T]` fp32 each, the same on all ranks.

    Raises:
        TypeError: Types that are not floating point, or differ between hidden and weight.
        ValueError: Shapes, labels (on CUDA a device-side assertion), `vocab_size` or options that
            do not fit.
    """
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size must be positive, got {chunk_size}")
    tokens, columns = labels.shape[0], weight.shape[0]

    def blocks(references: int, element: int) -> Blocks:
        if chunk_size is not None:
            return Blocks(chunk_size, columns, chunk_size >= tokens)
        budget, block = memory_budget_bytes, None
        if budget is None:
            needed = (tokens + references) * columns * element
            budget = memory_budget(weight.device, needed=needed, kept=torch.is_grad_enabled())
            block = None if weight.is_cuda else CPU_BLOCK
        return plan_blocks(
            tokens, columns, references, element_size=element, budget=budget, block=block
        )

    inputs = prepare(
        hidden,
        weight,
        labels,
        roles,
        reference_hidden=reference_hidden,
        reference_weight=reference_weight,
        tp_group=tp_group,
        sequence_parallel=sequence_parallel,
        vocab_size=vocab_size,
        fp32_logits=fp32_logits,
        fuse_weight_gradient=fuse_weight_gradient,
        backend=backend,
        blocks=blocks,
    )
    with torch.cuda.device_of(hidden):  # where Triton launches
        margin, kl = UnlearningHeadFunction.apply(*inputs)
    check_cuda_labels(inputs, vocab_size)
    return HeadOutput(margin, kl)
