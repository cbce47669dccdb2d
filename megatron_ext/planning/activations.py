"""Bytes that the backward pass needs of the forward pass, on one GPU.

Counted tensor by tensor as in arXiv 2205.05198, section 4.1, for layers without dropout, with SwiGLU
and an attention that keeps no scores.

Symbols as in `architecture`; e bytes of an activation, a heads.
"""

from __future__ import annotations

from dataclasses import replace

from megatron_ext.planning.architecture import Architecture
from megatron_ext.planning.layout import Layout


def layer_bytes_per_token(arch: Architecture, layout: Layout) -> float:
    """Bytes that one layer keeps for each token.

    Input and output of two norms and their fp32 scales (4 e h + 8; on a CPU 2 e h more, because there
    torch composes a norm of steps); query, key, value and context (e (2q + 2k), and e q more with
    grouped queries, which are copied out of the projection's buffer); the softmax's fp32 log-sum-exp
    (4 a); both halves before SwiGLU and its output (3 e f). Norms of queries and keys add their output
    (e (q + k), and on a CPU as much again), since no longer the projection is rotated in place, and an
    fp32 scale a head. Context parallelism joins the contexts of a rank's two chunks in another tensor (e q);
    the gathered keys and values are not kept. TP divides all but the layer's norms, which sequence
    parallelism divides (table 2 there). Full recompute keeps a layer's input alone; selective recompute makes
    the core attention again, which here saves the log-sum-exp and the chunks' contexts.
    """
    e = layout.element
    if layout.recompute == "full":
        return e * arch.hidden / layout.sequence_split
    copies = 3 if arch.query_groups < arch.heads else 2
    split = e * (copies * arch.query + 2 * arch.key + 3 * arch.ffn)
    if arch.qk_norm:
        normed = (2 if layout.cpu else 1) * e * (arch.query + arch.key)
        split += normed + 4 * (arch.heads + arch.query_groups)
    if layout.recompute == "none":
        split += 4 * arch.heads + (e * arch.query if layout.cp > 1 else 0)
    return 2 * _norm_bytes(arch, layout) / layout.sequence_split + split / layout.tp


def _norm_bytes(arch: Architecture, layout: Layout) -> int:
    """Of one norm and token: input, output and fp32 scale."""
    return (3 if layout.cpu else 2) * layout.element * arch.hidden + 4


def kept_bytes(arch: Architecture, layout: Layout, stage: int) -> int:
    """Bytes that the layers of a stage keep, of all microbatches in flight.

    With full recompute in groups of n layers (uniform) each group's input; or the input of the first n
    layers of a chunk, and everything of the others (block).
    """
    layers = arch.layers // (layout.pp * layout.vpp)
    layer = layer_bytes_per_token(arch, layout)
    chunk = layers * layer
    if layout.recompute == "full":
        n = min(layout.recompute_layers, layers)
        chunk = -(-layers // n) * layer
        if layout.recompute_method == "block":
            chunk = n * layer + (layers - n) * _whole(arch, layout)
    return round(layout.in_flight(stage) * chunk * layout.tokens)


def _whole(arch: Architecture, layout: Layout) -> float:
    return layer_bytes_per_token(arch, replace(layout, recompute="none"))


def final_norm_bytes(arch: Architecture, layout: Layout) -> int:
    """Bytes of input and output of the last stage's final norm.

    With sequence parallelism the head gathers that output and keeps it gathered.
    """
    output = layout.element * arch.hidden
    split = (_norm_bytes(arch, layout) - output) / layout.sequence_split
    return round((split + output) * layout.tokens)


def working_bytes(arch: Architecture, layout: Layout) -> int:
    """Bytes that exist only inside a layer's backward pass.

    The gradients of SwiGLU's input and output (3 e f), or, if they are more, the keys and values of all
    context-parallel ranks, their gradient and its copy in the order of the ranks (6 e k for each token of
    the whole sequence); the gradient of the residual stream (e h); with sequence parallelism the gathered
    input of a matrix and its gradient; and the layers that full recompute makes again, at once those of a
    group. In a chunk whose last layers are not recomputed (block) their memory is free by then.
    """
    gathered = 2 * arch.hidden if layout.sequence_parallel else 0
    residual = arch.hidden / layout.sequence_split
    attention = 6 * arch.key * layout.cp if layout.cp > 1 else 0
    inner = max(3 * arch.ffn, attention) / layout.tp
    width = layout.element * (inner + residual + gathered)
    if layout.recompute == "full":
        layers = arch.layers // (layout.pp * layout.vpp)
        n = min(layout.recompute_layers, layers)
        again = n if layout.recompute_method == "uniform" else int(n == layers)
        width += again * _whole(arch, layout)
    return round(width * layout.tokens)
