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


def memory_budget(device: torch.device) -> int:
    """Bytes that the logits of one chunk may take on `device`."""
    if device.type != "cuda":
        return CPU_BUDGET
    free, _ = torch.cuda.mem_get_info(device)
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(DEVICE_SHARE * (free + unused))


def chunk_tokens(
    tokens: int,
    columns: int,
    reference_tokens: int,
    *,
    element_size: int,
    budget: int,
) -> int:
    """Choose the chunk size.

    Args:
        tokens: Rows of hidden states, T.
        columns: Vocabulary columns of this shard, V.
        reference_tokens: How many of the rows have a reference.
        element_size: Bytes of a logit.
        budget: Bytes that the logits of student and reference may take together.

    Returns:
        Tokens a chunk, in 1..T; T when everything fits at once.
    """
    row = columns * element_size
    if (tokens + reference_tokens) * row <= budget:
        return max(tokens, 1)
    widest = row * (2 if reference_tokens else 1)  # a chunk may consist of replay rows alone
    chunk = budget // widest
    if chunk >= TILE:
        chunk -= chunk % TILE
    return max(1, min(chunk, tokens))
