"""How many tokens the unlearning head takes at a time: from memory, not a fixed small number.

Re-reading and re-writing an fp32 weight gradient for every chunk costs, at 8192 tokens x 2048
hidden x 131,072 vocabulary on an H200, 32 ms at 128 tokens a chunk and 0.5 ms at 8192; and one
chunk, whose logits wait for the backward pass, saves the products that would make them again.
"""

import torch

# The logits of a chunk and what is derived from them, where no device reports its free memory.
# Less makes the matrix products less efficient: 8 MiB cost 25% more time than 32 on a 2-core CPU.
CPU_BUDGET = 24 * 2**20
# Of the memory free on a device when the head is called, the share that the logits may take.
# The head runs where a step's activations are at their peak, so little else is allocated
# before its buffers are free again; the rest is room for the gradients and fragmentation.
DEVICE_SHARE = 0.6
# Chunks are multiples of this many tokens: a tile of a matrix product.
TILE = 64
# Fewer reference rows at a time are not worth keeping the student's logits for.
REFERENCE_CHUNK = 256


def memory_budget(device: torch.device, *, needed: int) -> int:
    """Bytes that the logits may take on `device`; asks no further once `needed` is sure to fit.

    The driver's answer takes longer than the launches of a small head; after the first step, what
    the allocator holds and does not use is mostly enough.
    """
    if device.type != "cuda":
        return CPU_BUDGET
    stats = torch.cuda.memory_stats_as_nested_dict(device)
    held, used = (
        stats[name]["all"]["current"] if stats else 0
        for name in ("reserved_bytes", "allocated_bytes")
    )
    if DEVICE_SHARE * (held - used) >= needed:
        return needed
    free, _ = torch.cuda.mem_get_info(device)
    return int(DEVICE_SHARE * (free + held - used))


def plan_chunks(
    tokens: int,
    columns: int,
    reference_tokens: int,
    *,
    element_size: int,
    budget: int,
) -> tuple[int, bool]:
    """Choose how much of the logits exists at a time.

    In this order, what fits `budget`:

    1. Everything is kept for the backward pass.
    2. The student's logits are kept; the reference's are made in chunks, twice.
    3. Both are made in chunks, twice.

    Args:
        tokens: Rows of hidden states, T.
        columns: Vocabulary columns of this shard, V.
        reference_tokens: How many of the rows have a reference.
        element_size: Bytes of a logit.
        budget: Bytes that the logits of student and reference may take together.

    Returns:
        Tokens a chunk, in 1..T, and whether all of the student's logits are kept.
    """
    row = columns * element_size
    if (tokens + reference_tokens) * row <= budget:
        return max(tokens, 1), True
    beside = (budget - tokens * row) // row
    if reference_tokens and beside >= REFERENCE_CHUNK:
        return _tiles(beside), True
    widest = row * (2 if reference_tokens else 1)  # a chunk may consist of replay rows alone
    return max(1, min(_tiles(budget // widest), tokens)), False


def _tiles(chunk: int) -> int:
    """The multiple of TILE not above `chunk`, which if less than one tile is left as it is."""
    return chunk - chunk % TILE if chunk >= TILE else chunk
