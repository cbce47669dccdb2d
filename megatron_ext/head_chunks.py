"""How many tokens' logits exist at a time in the head of training.

Here and without torch, because `losses` asks when a step runs and `planning` before one does.
"""

from __future__ import annotations

# Logits that are kept for the backward pass on a CPU, in bytes.
CPU_BUDGET = 32 * 2**20
# Where they do not fit: bytes of a chunk's logits, the reference's included; and of the size of the weight's
# gradient, which each chunk reads and writes as a whole, the share that the student's logits take at least.
CPU_CHUNK = CPU_BUDGET // 2
CPU_SHARE = 1 / 4
# Of a GPU's whole memory, the share that the logits may take. Not of the free memory: ranks that share a
# vocabulary must agree on the chunks.
GPU_SHARE = 1 / 16
# Tokens of a tile of a matrix product.
TILE = 64


def training_chunk(
    tokens: int,
    columns: int,
    hidden: int,
    reference_tokens: int,
    *,
    element_size: int,
    gradient_size: int,
    gpu_memory: int | None,
) -> int:
    """Tokens of a chunk where the gradients are taken in the forward pass.

    Args:
        tokens: rows of hidden states, T.
        columns: vocabulary columns of this shard, V.
        hidden: width of the hidden states, H.
        reference_tokens: how many of the rows have a reference.
        element_size: bytes of a logit.
        gradient_size: bytes of an element of what the weight's gradient is summed in.
        gpu_memory: bytes of the GPU; None on a CPU.

    Returns:
        `tokens` if all logits fit; otherwise fewer, for chunks of about one size.
    """
    row = columns * element_size
    budget = CPU_BUDGET if gpu_memory is None else int(GPU_SHARE * gpu_memory)
    if (tokens + reference_tokens) * row <= budget:
        return tokens
    both = row * (2 if reference_tokens else 1)
    if gpu_memory is None:
        share = int(CPU_SHARE * hidden * gradient_size / element_size)
        most = max(TILE, share, CPU_CHUNK // both)
    else:
        most = max(1, budget // both)
    chunks = -(-tokens // most)
    even = -(-tokens // chunks)
    return min(tokens, most, -(-even // TILE) * TILE)
