"""Arithmetic on blocks of rows of one vocabulary shard: the helpers of `vocab_parallel`.

Logits are `[N, V]` of any float type, statistics `[N]`; on precision, see there.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

_LOG2_E = math.log2(math.e)
# Elements of a block of rows. CPU: the temporaries stay in cache (1 MiB in fp64). CUDA: kernels are
# long enough to hide their launches, and a temporary takes 128 MiB at most for V <= 131,072.
BLOCK_ELEMENTS = {"cpu": 2**17, "cuda": 2**24}


def work_dtype(logits: Tensor, has_reference: bool) -> torch.dtype:
    """The type of the arithmetic; see `vocab_parallel` on precision."""
    return torch.float64 if has_reference else torch.promote_types(logits.dtype, torch.float32)


def own_copy(z: Tensor, work: torch.dtype) -> Tensor:
    """A block that may be overwritten, contiguous whatever the strides of the logits are."""
    return z.to(work, copy=True, memory_format=torch.contiguous_format)


def row_blocks(logits: Tensor) -> Iterator[slice]:
    """Slices of rows, so that temporaries are a block and not another `[N, V]`."""
    step = max(1, BLOCK_ELEMENTS.get(logits.device.type, 2**24) // logits.shape[1])
    return (slice(i, i + step) for i in range(0, logits.shape[0], step))


def label_columns(labels: Tensor, vocab_start: int, valid_columns: int) -> tuple[Tensor, Tensor]:
    """Local column of each label, `[N, 1]`, 0 if not in this shard; and whether it is, `[N, 1]`."""
    column = labels.long().unsqueeze(-1) - vocab_start
    inside = (column >= 0) & (column < valid_columns)
    return torch.where(inside, column, 0), inside


def no_statistics(fields: int, tokens: int, *, device: torch.device) -> Tensor:
    """`[fields, tokens]` fp64: what a part of the vocabulary without a column has to say."""
    stats = torch.full((fields, tokens), -math.inf, dtype=torch.float64, device=device)
    stats[4:] = 0.0
    return stats


def exp_(x: Tensor) -> Tensor:
    """`exp(x)`, written to `x`, with a relative error of `|x|` roundings of its type.

    On a CPU torch's `exp2` takes a quarter of the time of its `exp` (fp64: 0.4 ns and 1.3 an element).
    """
    return x.mul_(_LOG2_E).exp2_()


def logsumexp_(z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Log-sum-exp of each row in fp64 (-inf for a row that is all -inf), and what it is made of.

    Returns:
        `[N]`; `exp(z - max)`, written to `z`; and the sum of that, `[N]`.
    """
    largest = z.amax(-1, keepdim=True)
    largest = torch.where(largest == -math.inf, 0.0, largest)
    total = exp_(z.sub_(largest)).sum(-1)
    return largest.squeeze(-1).double() + total.double().log(), z, total


def exp_difference(z: Tensor, lse: Tensor, work: torch.dtype) -> Tensor:
    """`exp(z - lse)` as a new tensor; `[N, V]` of any type and `[N]` fp64.

    The fp64 `lse` is taken away in two parts: rounded to fp32 it would cost a relative error of
    5e-4 at an offset of 1e4.
    """
    coarse = lse.to(work)
    difference = own_copy(z, work).sub_(coarse.unsqueeze(-1))
    if work != torch.float64:
        difference.sub_((lse - coarse).to(work).unsqueeze(-1))
    return exp_(difference)
