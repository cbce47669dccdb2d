"""The flash kernel of a GPU for sequences of many lengths, by its formula, for a CPU.

`torch.nn.attention.varlen` has kernels for GPUs alone. With these in their place its calls can be checked
without one: what it is given, and what its documentation says of the mask.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

_installed: list[torch.library.Library] = []


def install() -> torch.library.Library:
    """Give the CPU these kernels; what is returned takes them away again."""
    library = torch.library.Library("aten", "IMPL")
    library.impl("_flash_attention_forward", _forward, "CPU")
    library.impl("_flash_attention_backward", _backward, "CPU")
    _installed.append(library)  # or they go with it
    return library


@contextmanager
def on_cpu() -> Iterator[None]:
    """Let the CPU have these kernels."""
    library = install()
    try:
        yield
    finally:
        _installed.remove(library)
        library._destroy()


def _sequences(*ends: Tensor) -> Iterator[tuple[slice, slice]]:
    """The queries of each sequence, and its keys."""
    queries, keys = (row.tolist() for row in ends)
    for i in range(len(queries) - 1):
        yield slice(*queries[i : i + 2]), slice(*keys[i : i + 2])


def _scores(query: Tensor, key: Tensor, scale: float | None) -> Tensor:
    """Softmax of `[h, n, m]` in fp32, of queries that end with the keys; grouped heads are repeated."""
    n, m, size = len(query), len(key), query.shape[-1]
    scores = torch.einsum("nhd,mhd->hnm", query, key) * (size**-0.5 if scale is None else scale)
    seen = torch.ones(n, m, dtype=torch.bool).tril(m - n)
    return scores.masked_fill(~seen, -torch.inf).softmax(dim=-1)


def _repeated(t: Tensor, heads: int) -> Tensor:
    return t.float().repeat_interleave(heads // t.shape[1], dim=1)


def _check(tensors: tuple[Tensor, ...], ends: tuple[Tensor, ...], longest: tuple[int, ...]) -> None:
    """What the kernel needs."""
    for t in tensors:
        assert t.dtype in (torch.bfloat16, torch.float16)
        assert t.dim() == 3
        assert t.stride(-1) == 1
        assert t.shape[-1] % 8 == 0
    for row, most in zip(ends, longest, strict=True):
        assert row.dtype == torch.int32
        assert row.is_contiguous()
        assert row[0] == 0
        assert row.diff().max() == most
        assert row.diff().min() > 0
    assert [int(row[-1]) for row in ends] == [len(tensors[0]), len(tensors[1])]


def _forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    ends_q: Tensor,
    ends_k: Tensor,
    max_q: int,
    max_k: int,
    dropout: float,
    is_causal: bool,
    return_debug_mask: bool,
    *,
    scale: float | None = None,
    **options: Any,
) -> tuple[Tensor, ...]:
    _check((query, key, value), (ends_q, ends_k), (max_q, max_k))
    assert is_causal
    assert dropout == 0
    assert (options["window_size_left"], options["window_size_right"]) == (-1, 0)
    heads = query.shape[1]
    context = torch.empty_like(query)
    for queries, keys in _sequences(ends_q, ends_k):
        weights = _scores(query[queries].float(), _repeated(key[keys], heads), scale)
        mixed = torch.einsum("hnm,mhd->nhd", weights, _repeated(value[keys], heads))
        context[queries] = mixed.to(context.dtype)
    unused = query.new_empty(0)
    return context, query.new_empty(0, dtype=torch.float32), unused, unused, unused


def _backward(
    gradient: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    context: Tensor,
    log_sums: Tensor,
    ends_q: Tensor,
    ends_k: Tensor,
    max_q: int,
    max_k: int,
    dropout: float,
    is_causal: bool,
    rng_state: Tensor,
    unused: Tensor,
    *,
    scale: float | None = None,
    **options: Any,
) -> tuple[Tensor, ...]:
    _check((query, key, value), (ends_q, ends_k), (max_q, max_k))
    heads, groups = query.shape[1], key.shape[1]
    factor = query.shape[-1] ** -0.5 if scale is None else scale
    results = [torch.empty_like(t) for t in (query, key, value)]
    for queries, keys in _sequences(ends_q, ends_k):
        q, k, v = query[queries].float(), *(_repeated(t[keys], heads) for t in (key, value))
        out, weights = gradient[queries].float(), _scores(q, k, scale)
        inner = torch.einsum("nhd,mhd->hnm", out, v)
        inner = weights * (inner - (weights * inner).sum(dim=-1, keepdim=True)) * factor
        found = (
            torch.einsum("hnm,mhd->nhd", inner, k),
            torch.einsum("hnm,nhd->mhd", inner, q).unflatten(1, (groups, -1)).sum(dim=2),
            torch.einsum("hnm,nhd->mhd", weights, out).unflatten(1, (groups, -1)).sum(dim=2),
        )
        for result, part, place in zip(results, found, (queries, keys, keys), strict=True):
            result[place] = part.to(result.dtype)
    return tuple(results)
