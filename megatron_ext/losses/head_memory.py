"""How much of the logits the unlearning head holds at a time: from memory, not a fixed small number.

Everything, if it fits. Else, where the loss is known only after the forward pass (`head`), blocks of the
vocabulary with all tokens, so that the weight's gradient, the largest of the results, is written once:
re-reading and re-writing it in fp32 for every chunk of tokens costs, at 8192 tokens x 2048 hidden x 131,072
vocabulary on an H200, 32 ms at 128 tokens a chunk. What is summed over the blocks is the gradient of the
hidden states, which is smaller wherever there are fewer tokens than words.

Where it is known (`head_loss`), chunks of tokens with the whole vocabulary, because the gradient of a token's
logits needs all of them; large ones, for the same reason (`megatron_ext.head_chunks`).
"""

from typing import NamedTuple

import torch

from megatron_ext import head_chunks
from megatron_ext.head_chunks import TILE

# On a CPU, where the logits do not fit: those of a block, which then stay in the processor's cache.
CPU_BLOCK = 2 * 2**20
# Of the memory free on a device when the head is called, the share that the logits may take.
# The head runs where a step's activations are at their peak, so little else is allocated
# before its buffers are free again; the rest is room for the gradients and fragmentation.
DEVICE_SHARE = 0.6
# Blocks are multiples of TILE tokens and of this many columns: tiles of a matrix product.
COLUMNS_TILE = 256
# Fewer reference rows at a time are not worth keeping the student's logits for.
REFERENCE_CHUNK = 256


class Blocks(NamedTuple):
    """What part of the logits exists at a time.

    Attributes:
        tokens: rows of a block.
        columns: columns of a block.
        whole: all of the student's logits are kept; a block is one of the reference's.
    """

    tokens: int
    columns: int
    whole: bool


def memory_budget(device: torch.device, *, needed: int, kept: bool = True) -> int:
    """Bytes that the logits may take on `device`; asks no further once `needed` is sure to fit.

    The driver's answer takes longer than the launches of a small head; after the first step, what
    the allocator holds and does not use is mostly enough.

    Args:
        device: where they are.
        needed: bytes of all of them.
        kept: a backward pass follows. Without one, blocks cost no product more, and little is taken: the
            call may come in the middle of a training step.
    """
    if device.type != "cuda":
        return head_chunks.CPU_BUDGET
    if not kept:
        total = torch.cuda.get_device_properties(device).total_memory
        needed = min(needed, int(head_chunks.GPU_SHARE * total))
    stats = torch.cuda.memory_stats_as_nested_dict(device)
    held, used = (
        stats[name]["all"]["current"] if stats else 0
        for name in ("reserved_bytes", "allocated_bytes")
    )
    if DEVICE_SHARE * (held - used) >= needed:
        return needed
    free, _ = torch.cuda.mem_get_info(device)
    return min(needed, int(DEVICE_SHARE * (free + held - used)))


def plan_blocks(
    tokens: int,
    columns: int,
    reference_tokens: int,
    *,
    element_size: int,
    budget: int,
    block: int | None = None,
) -> Blocks:
    """Choose how much of the logits exists at a time.

    In this order, what fits `budget`:

    1. Everything is kept for the backward pass.
    2. The student's logits are kept; the reference's are made in chunks of tokens, twice.
    3. Both are made twice, in blocks of the vocabulary, and of the tokens where there are very many.

    Args:
        tokens: Rows of hidden states, T.
        columns: Vocabulary columns of this shard, V.
        reference_tokens: How many of the rows have a reference.
        element_size: Bytes of a logit.
        budget: Bytes that the logits of student and reference may take together.
        block: Bytes of a block in the third case, at most `budget`; None: `budget`.

    Returns:
        The blocks: 1..T tokens, 1..V columns.
    """
    row = columns * element_size
    if (tokens + reference_tokens) * row <= budget:
        return Blocks(max(tokens, 1), columns, True)
    beside = (budget - tokens * row) // row
    if reference_tokens and beside >= REFERENCE_CHUNK:
        return Blocks(_tiles(beside, TILE), columns, True)
    block = budget if block is None else min(block, budget)
    wide = block // ((tokens + reference_tokens) * element_size)
    if wide >= min(COLUMNS_TILE, columns):
        return Blocks(tokens, min(_tiles(wide, COLUMNS_TILE), columns), False)
    wide = min(COLUMNS_TILE, columns)
    # A block may consist of replay rows alone.
    rows = block // (wide * element_size * (2 if reference_tokens else 1))
    return Blocks(max(1, min(_tiles(rows, TILE), tokens)), wide, False)


def _tiles(size: int, tile: int) -> int:
    """The multiple of `tile` not above `size`, which if less than one tile is left as it is."""
    return size - size % tile if size >= tile else size
