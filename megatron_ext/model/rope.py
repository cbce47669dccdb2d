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


def _rotate_eager(t: Tensor, out: Tensor, cos: Tensor, sin: Tensor, *, back: bool) -> None:
    half = cos.shape[-1]
    cos, sin = cos[:, None, None, None], sin[:, None, None, None]
    first, second = t[..., :half], t[..., half : 2 * half]
    out_first, out_second = out[..., :half], out[..., half : 2 * half]
    sign = -1 if back else 1
    if t.dtype != cos.dtype:  # half precision is rounded once, at the end
        a, b = first.to(cos.dtype), second.to(cos.dtype)
        out_first.copy_(torch.mul(a, cos).addcmul_(b, sin, value=-sign))
        out_second.copy_(torch.mul(b, cos).addcmul_(a, sin, value=sign))
        return
    if t is out:
        first = first.clone()
    torch.mul(first, cos, out=out_first).addcmul_(second, sin, value=-sign)
    torch.mul(second, cos, out=out_second).addcmul_(first, sin, value=sign)


def rotate_into(t: Tensor, out: Tensor, cos: Tensor, sin: Tensor, *, back: bool = False) -> None:
    """Write the rotation of `t` into `out`; autograd does not see it.

    Args:
        t: `[s, b, g, n, d]`, n heads of each group; the last dimension contiguous, any view.
        out: As `t`, or `t` itself.
        cos: `[s, rot / 2]` fp32, see `cos_sin`. What lies beyond `rot` is copied.
        sin: As `cos`.
        back: Rotate by the opposite angle.
    """
    rotate_by = rope_kernel.rotate_into if rope_kernel.usable(t) else _rotate_eager
    rotate_by(t, out, cos, sin, back=back)
    rotated = 2 * cos.shape[-1]
    if out is not t and rotated < t.shape[-1]:
        out[..., rotated:].copy_(t[..., rotated:])


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, t: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        out = torch.empty_like(t, memory_format=torch.contiguous_format)
        rotate_into(t[:, :, None], out[:, :, None], cos, sin)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        out = torch.empty_like(grads[0], memory_format=torch.contiguous_format)
        grad = _last_contiguous(grads[0])
        rotate_into(grad[:, :, None], out[:, :, None], cos, sin, back=True)
        return out, None, None


def _last_contiguous(t: Tensor) -> Tensor:
    """A gradient may come expanded, with strides of zero."""
    return t if t.stride(-1) == 1 else t.contiguous()


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
        ctx: Any, mixed: Tensor, cos: Tensor | None, sin: Tensor | None, dims: tuple[int, int, int]
    ) -> tuple[Tensor, Tensor, Tensor]:
        groups, heads, head_size = dims
        ctx.save_for_backward(cos, sin)
        ctx.dims = dims
        buffer = mixed.detach().unflatten(-1, (groups, heads + 2, head_size))
        if heads == 1 or groups == 1:
            # In place: nothing else reads the projection's output (its backward keeps its input and
            # its weight), so queries, keys and values stay in the one buffer that it already is.
            turned = buffer[..., :-1, :]
            _move(turned, turned, cos, sin)
            query, key, value = (t.flatten(2, 3) for t in buffer.split((heads, 1, 1), dim=3))
            return query, key, value
        # Groups of queries with keys and values between them are no view of all queries, and keys and
        # values that stayed there would keep the whole buffer.
        query = mixed.new_empty(*mixed.shape[:-1], groups * heads, head_size)
        key, value = mixed.new_empty(2, *mixed.shape[:-1], groups, head_size)
        _move(buffer[..., :heads, :], query.unflatten(2, (groups, heads)), cos, sin)
        _move(buffer[..., heads:-1, :], key[:, :, :, None], cos, sin)
        value.copy_(buffer[..., -1, :])
        return query, key, value

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        cos, sin = ctx.saved_tensors
        groups, heads, head_size = ctx.dims
        d_query, d_key, d_value = (_last_contiguous(grad) for grad in grads)
        out = d_value.new_empty(*d_value.shape[:2], groups, heads + 2, head_size)
        for grad, part in ((d_query, out[..., :heads, :]), (d_key, out[..., heads:-1, :])):
            _move(grad.unflatten(2, (groups, -1)), part, cos, sin, back=True)
        out[..., -1, :].copy_(d_value)
        return out.flatten(2), None, None, None


def _move(
    t: Tensor, out: Tensor, cos: Tensor | None, sin: Tensor | None, *, back: bool = False
) -> None:
    """`rotate_into`, or a copy where there is no rotation."""
    if cos is not None and sin is not None:
        rotate_into(t, out, cos, sin, back=back)
    elif out is not t:
        out.copy_(t)


def split_rotate(
    mixed: Tensor, cos: Tensor | None, sin: Tensor | None, *, groups: int, heads: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Split the output of the query-key-value projection and rotate queries and keys.

    `mixed` may be overwritten; it must not be read afterwards, nor be saved by the operation that made
    it. With one group, or one query head a group, the results are views of it; otherwise they have memory
    of their own, as much, and `mixed` is free as soon as its maker lets it go.

    Args:
        mixed: `[s, b, g * (r + 2) * d]`, each group its r query heads, then key, then value.
        cos: `[s, rot / 2]` fp32, see `cos_sin`; None to split without a rotation.
        sin: As `cos`.
        groups: g on this rank.
        heads: r.

    Returns:
        Queries `[s, b, g * r, d]`, keys and values `[s, b, g, d]`.
    """
    head_size = mixed.shape[-1] // (groups * (heads + 2))
    return _SplitRotate.apply(mixed, cos, sin, (groups, heads, head_size))
