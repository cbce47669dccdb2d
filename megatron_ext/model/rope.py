"""Rotary position embedding that moves each element once.

Megatron's unfused path takes about a dozen passes over the queries and as many over the keys
(negate, concatenate, two products, a sum and a copy). A rotation of pairs needs one read and one
write, its backward is the rotation by the opposite angle, and neither needs a saved activation.

Shapes: s sequence, b batch, g query groups (key heads), r query heads per group, d head size,
rot <= d the rotated part of a head.
"""

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from megatron_ext.model import rope_kernel


@lru_cache(maxsize=8)
def _cached_cos_sin(freqs: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    half = freqs.float().flatten(1)[:, : freqs.shape[-1] // 2]
    return half.cos() * scale, half.sin() * scale


def cos_sin(freqs: Tensor, *, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the rotation, kept for the layers that follow.

    All layers of a model receive the very same `freqs` object, and Megatron itself caches it, so
    the result is cached by identity.

    Args:
        freqs: Angles `[s, 1, 1, rot]` whose second half repeats the first (not interleaved).
        scale: Factor on both, YaRN's concentration factor.

    Returns:
        Two fp32 tensors `[s, rot / 2]`.
    """
    if torch.is_inference_mode_enabled():  # such tensors cannot take part in training later
        return _cached_cos_sin.__wrapped__(freqs, scale)
    return _cached_cos_sin(freqs, scale)


def _rotate_eager(t: Tensor, cos: Tensor, sin: Tensor) -> None:
    half = cos.shape[-1]
    first, second = t[..., :half], t[..., half : 2 * half]
    cos, sin = cos[:, None, None, None], sin[:, None, None, None]
    if t.dtype != cos.dtype:
        a, b = first.to(cos.dtype), second.to(cos.dtype)
        first.copy_(a * cos - b * sin)
        second.copy_(b * cos + a * sin)
        return
    carried = first * sin
    first.mul_(cos).addcmul_(second, sin, value=-1)
    second.mul_(cos).add_(carried)


def rotate_(t: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Rotate `t` `[s, b, g, heads, d]` in place, in fp32; `d` beyond `rot` is left as it is.

    `t` may be any view whose last dimension is contiguous. Autograd does not see it.
    """
    if rope_kernel.usable(t):
        rope_kernel.rotate_(t, cos, sin)
    else:
        _rotate_eager(t, cos, sin)


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, t: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        out = t.clone(memory_format=torch.contiguous_format)
        rotate_(out[:, :, None], cos, sin)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        out = grads[0].clone(memory_format=torch.contiguous_format)
        rotate_(out[:, :, None], cos, -sin)
        return out, None, None


def rotate(t: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate queries or keys by their position, out of place and differentiably.

    Args:
        t: Queries or keys `[s, b, heads, d]`.
        cos: `[s, rot / 2]` fp32, see `cos_sin`.
        sin: As `cos`.

    Returns:
        The rotated tensor, contiguous.
    """
    return _Rotate.apply(t, cos, sin)


class _SplitRotate(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, mixed: Tensor, cos: Tensor, sin: Tensor, dims: tuple[int, int, int]
    ) -> tuple[Tensor, Tensor, Tensor]:
        groups, heads, head_size = dims
        ctx.save_for_backward(cos, sin)
        ctx.dims = dims
        # In place: nothing else reads the projection's output (its backward keeps its input and
        # its weight), so queries, keys and values stay in the one buffer that it already is.
        buffer = mixed.detach().unflatten(-1, (groups, heads + 2, head_size))
        rotate_(buffer[..., : heads + 1, :], cos, sin)
        query, key, value = buffer.split((heads, 1, 1), dim=3)
        return query.flatten(2, 3), key.flatten(2, 3), value.flatten(2, 3)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        cos, sin = ctx.saved_tensors
        groups, heads, _ = ctx.dims
        parts = [
            grad.unflatten(2, (groups, n)) for grad, n in zip(grads, (heads, 1, 1), strict=True)
        ]
        out = torch.cat(parts, dim=3)
        rotate_(out[..., : heads + 1, :], cos, -sin)
        return out.flatten(2), None, None, None


def split_rotate(
    mixed: Tensor, cos: Tensor, sin: Tensor, *, groups: int, heads: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Split the output of the query-key-value projection and rotate queries and keys.

    `mixed` is overwritten; it must not be read afterwards, nor be saved by the operation that made
    it.

    Args:
        mixed: `[s, b, g * (r + 2) * d]`, each group its r query heads, then key, then value.
        cos: `[s, rot / 2]` fp32, see `cos_sin`.
        sin: As `cos`.
        groups: g on this rank.
        heads: r.

    Returns:
        Queries `[s, b, g * r, d]`, keys and values `[s, b, g, d]`; views of `mixed` where their
        layout allows it.
    """
    head_size = mixed.shape[-1] // (groups * (heads + 2))
    return _SplitRotate.apply(mixed, cos, sin, (groups, heads, head_size))
