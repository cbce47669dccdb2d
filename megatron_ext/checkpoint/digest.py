"""A digest of a distributed model that does not depend on how it is sharded.

Each element contributes its bits times an odd 64-bit number derived from its tensor's key and its
global index; contributions add up modulo 2**64, so shards can be summed in any order by one
all-reduce. It finds accidental differences (another checkpoint, a changed weight); it is no
cryptographic hash.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor, is_main_replica

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_BLOCK_ELEMENTS = 1 << 22  # 32 MiB of int64 at a time


def model_digest(tensors: Iterable[ShardedTensor], *, vocab_size: int) -> str:
    """Digest of the weights that all ranks hold together.

    Args:
        tensors: this rank's shards, factories already applied; replicas other than the main one are
            left out, so every element of the model counts once.
        vocab_size: rows of vocabulary-sized tensors at and above it are padding and do not count.

    Returns:
        16 hexadecimal digits, the same on every rank.
    """
    total: torch.Tensor | None = None
    for tensor in tensors:
        if tensor.data is None or not is_main_replica(tensor.replica_id):
            continue
        part = _shard_sum(tensor, vocab_size)
        total = part if total is None else total + part
    if total is None:
        total = torch.zeros((), dtype=torch.int64)
    if torch.distributed.is_initialized():
        total = total.to(torch.cuda.current_device())
        torch.distributed.all_reduce(total)
    return f"{int(total) & (2**64 - 1):016x}"


def _shard_sum(tensor: ShardedTensor, vocab_size: int) -> torch.Tensor:
    """Sum of the contributions of one shard, int64 scalar."""
    data = tensor.data
    assert data is not None
    assert tensor.flattened_range is None, "model weights are never flattened"
    offsets = tensor.global_offset
    prepended = tensor.prepend_axis_num
    seeds = [_odd_number(f"{tensor.key}/{axis}") for axis in range(len(offsets))]
    base = _odd_number(tensor.key)
    for offset, seed in zip(offsets[:prepended], seeds[:prepended], strict=True):
        base += offset * seed
    rows = data.detach().reshape(data.shape[0] if data.dim() else 1, -1)
    row_offset = offsets[prepended] if data.dim() else 0
    if tensor.allow_shape_mismatch:
        rows = rows[: max(0, vocab_size - row_offset)]
    # The index within a row: any of the remaining axes moves it by its own seed.
    columns = torch.zeros((1,), dtype=torch.int64, device=data.device)
    for axis in range(1, data.dim()):
        size = data.shape[axis]
        steps = (
            torch.arange(size, dtype=torch.int64, device=data.device) + offsets[prepended + axis]
        )
        columns = (columns[:, None] + steps * _signed(seeds[prepended + axis])).flatten()
    total = torch.zeros((), dtype=torch.int64, device=data.device)
    block = max(1, _BLOCK_ELEMENTS // max(1, rows.shape[1]))
    for start in range(0, rows.shape[0], block):
        part = rows[start : start + block].contiguous()
        index = torch.arange(start, start + part.shape[0], dtype=torch.int64, device=data.device)
        row = (index + row_offset) * _signed(seeds[prepended] if data.dim() else 1) + _signed(base)
        weights = _mix(row[:, None] + columns) | 1
        bits = part.view(_BITS[part.element_size()]).to(torch.int64)
        total += (bits * weights).sum()
    return total


def _odd_number(key: str) -> int:
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8]) | 1


def _signed(value: int) -> int:
    """The same 64 bits as a signed number, for torch."""
    value &= 2**64 - 1
    return value - 2**64 if value >= 2**63 else value


def _mix(x: torch.Tensor) -> torch.Tensor:
    """Spread neighbouring indices over all 64 bits (the finaliser of splitmix64)."""
    x = (x ^ _shift(x, 30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ _shift(x, 27)) * _signed(0x94D049BB133111EB)
    return x ^ _shift(x, 31)


def _shift(x: torch.Tensor, bits: int) -> torch.Tensor:
    """Logical shift to the right of int64."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)
