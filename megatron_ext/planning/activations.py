"""Bytes that the backward pass needs of the forward pass, on one GPU.

Counted tensor by tensor as in arXiv 2205.05198, section 4.1, for layers without dropout, with SwiGLU
and an attention that keeps no scores; of a mixture of experts as in `mixture`.

Symbols as in `architecture`; e bytes of an activation, a heads.
"""

from __future__ import annotations

from dataclasses import replace

from megatron_ext.planning.architecture import Architecture
from megatron_ext.planning.layout import Layout
from megatron_ext.planning.mixture import Mixture


def layer_bytes_per_token(arch: Architecture, layout: Layout, kind: Mixture | None = None) -> float:
    """Bytes that one layer keeps for each token.

    Input and output of two norms and their fp32 scales (4 e h + 8; on a CPU 2 e h more, because there
    torch composes a norm of steps); query, key, value and context (e (2q + 2k)); the softmax's fp32
    log-sum-exp (4 a); both halves before SwiGLU and its output (3 e f). Norms of queries and keys add
    their output (e (q + k), and on a CPU as much again) to the projection, which they keep, and an fp32
    scale a head. Context parallelism joins the contexts of a rank's two chunks in another tensor (e q);
    the gathered keys and values are not kept. TP divides all but the layer's norms, which sequence
    parallelism divides (table 2 there). Full recompute keeps a layer's input alone; selective recompute makes
    the core attention again, which here saves the log-sum-exp and the chunks' contexts.

    Args:
        arch: the model.
        layout: the layout.
        kind: the mixture of experts that the layer is, None where it is dense.
    """
    e = layout.element
    if layout.recompute == "full":
        return e * arch.hidden / layout.sequence_split
    split = 2 * e * (arch.query + arch.key)
    if kind is None:
        split += 3 * e * arch.ffn
    if arch.qk_norm:
        normed = (2 if layout.cpu else 1) * e * (arch.query + arch.key)
        split += normed + 4 * (arch.heads + arch.query_groups)
    if layout.recompute == "none":
        split += 4 * arch.heads + (e * arch.query if layout.cp > 1 else 0)
    kept = 2 * _norm_bytes(arch, layout) / layout.sequence_split + split / layout.tp
    return kept if kind is None else kept + _mixture_bytes(arch, layout, kind)


def _mixture_bytes(arch: Architecture, layout: Layout, kind: Mixture) -> float:
    """Of the mixture in a layer and for each token, beside the norm's output, which the router keeps.

    Each row that experts compute: its input, both halves before SwiGLU and its output (e (h + 3 m)), and its
    fp32 weight. Each expert of a token: its number and fp32 weight, and the place of its row (20). To sort
    the rows, of each of E experts 8; after an all-gather 5 for each token of the experts' TP ranks. Shared
    experts 3 e of their width, and with a gate their output before it. What losses that balance experts
    keep, at most some 8 (E + k), is not counted.
    """
    e, etp = layout.element, layout.etp
    rows = kind.topk * etp * (e * (arch.hidden + 3 * kind.ffn / etp) + 4)
    sort = 5 * etp if kind.dispatcher == "allgather" else 8
    gate = e * arch.hidden + 4 if kind.gate and kind.shared else 0
    local = rows + 20 * kind.topk + sort * kind.experts + gate
    return local / layout.sequence_split + 3 * e * kind.shared / layout.tp


def _norm_bytes(arch: Architecture, layout: Layout) -> int:
    """Of one norm and token: input, output and fp32 scale."""
    return (3 if layout.cpu else 2) * layout.element * arch.hidden + 4


def kept_bytes(arch: Architecture, layout: Layout, stage: int) -> int:
    """Bytes that the layers of a stage keep, of all microbatches in flight.

    With full recompute in groups of n layers (uniform) each group's input; or the input of the first n
    layers of a chunk, and everything of the others (block). The interleaved schedule runs as many
    microbatches as there are stages through a chunk before it goes on to the next.
    """
    chunks = [_chunk_bytes(arch, layout, stage, chunk) for chunk in range(layout.vpp)]
    held = range(layout.in_flight(stage))
    return round(sum(chunks[i // layout.pp % layout.vpp] for i in held) * layout.tokens)


def _chunk_bytes(arch: Architecture, layout: Layout, stage: int, chunk: int) -> float:
    """Of the layers of a chunk, for each token."""
    kinds = arch.kinds(stage, chunk, layout.split)
    if layout.recompute != "full":
        return sum(layer_bytes_per_token(arch, layout, kind) for kind in kinds)
    one, n = layer_bytes_per_token(arch, layout), min(layout.recompute_layers, len(kinds))
    if layout.recompute_method == "uniform":
        return -(-len(kinds) // n) * one
    return n * one + sum(_whole(arch, layout, kind) for kind in kinds[n:])


def _whole(arch: Architecture, layout: Layout, kind: Mixture | None) -> float:
    return layer_bytes_per_token(arch, replace(layout, recompute="none"), kind)


def final_norm_bytes(arch: Architecture, layout: Layout) -> int:
    """Bytes of input and output of the last stage's final norm.

    With sequence parallelism the head gathers that output and keeps it gathered.
    """
    output = layout.element * arch.hidden
    split = (_norm_bytes(arch, layout) - output) / layout.sequence_split
    return round((split + output) * layout.tokens)


def working_bytes(arch: Architecture, layout: Layout, stage: int) -> int:
    """Bytes that exist only inside a layer's backward pass, of the layer that needs most.

    The gradients of SwiGLU's input and output (3 e f), or, if they are more, the keys and values of all
    context-parallel ranks, their gradient and its copy in the order of the ranks (6 e k for each token of
    the whole sequence); the gradient of the residual stream (e h); with sequence parallelism the gathered
    input of a matrix and its gradient; and the layers that full recompute makes again, at once those of a
    group. In a chunk whose last layers are not recomputed (block) their memory is free by then.
    """
    gathered = 2 * arch.hidden if layout.sequence_parallel else 0
    residual = arch.hidden / layout.sequence_split
    attention = (6 * arch.key * layout.cp if layout.cp > 1 else 0) / layout.tp
    most = 0.0
    for chunk in range(layout.vpp):
        kinds = arch.kinds(stage, chunk, layout.split)
        inner = max(attention, *(_inner_width(arch, layout, kind) for kind in kinds))
        width = layout.element * (inner + residual + gathered)
        if layout.recompute == "full":
            if any(kind is not None for kind in kinds):
                width += layout.element * residual  # an output made again, beside its gradient
            whole = [_whole(arch, layout, kind) for kind in kinds]
            n = min(layout.recompute_layers, len(kinds))
            if layout.recompute_method == "uniform":
                width += max(sum(whole[first : first + n]) for first in range(0, len(kinds), n))
            elif n == len(kinds):
                width += max(whole)
        most = max(most, width)
    return round(most * layout.tokens)


def _inner_width(arch: Architecture, layout: Layout, kind: Mixture | None) -> float:
    """Elements for each token that exist only while a layer's feed-forward part computes.

    A mixture needs most at the end of its forward pass, when nothing of what it keeps is free yet; its
    shared experts in the backward pass.
    """
    if kind is None:
        return 3 * arch.ffn / layout.tp
    return max(_passing(arch, layout, kind), 3 * kind.shared / layout.tp)


def _passing(arch: Architecture, layout: Layout, kind: Mixture) -> float:
    """Elements for each token of what experts' rows leave behind, but is not kept.

    Their outputs one by one, and joined; for all to all the rows before they are sorted by expert, and as
    they were sent; after an all-gather the tokens of all ranks.
    """
    rows = kind.topk * layout.etp
    if kind.dispatcher == "allgather":
        ranks = layout.ep * layout.etp
        width = 2 * rows + (ranks if ranks > 1 else 0)
    else:
        width = 3 * rows + (kind.topk if layout.ep > 1 else 0)
    return width * arch.hidden / layout.sequence_split


def forward_bytes(arch: Architecture, layout: Layout, stage: int) -> int:
    """Bytes of a layer's tensors where nothing is kept, of the layer that needs most.

    Its input, the projection, context, both halves and their product. Experts are taken to compute theirs
    all at once (Transformer Engine's do so with ``--moe-grouped-gemm`` only).
    """
    width = arch.hidden + 2 * arch.query / layout.tp

    def inner(kind: Mixture | None) -> float:
        if kind is None:
            return 3 * arch.ffn / layout.tp
        rows = kind.topk * (layout.etp * arch.hidden + 3 * kind.ffn)
        return _passing(arch, layout, kind) + rows / layout.sequence_split

    kinds = {kind for c in range(layout.vpp) for kind in arch.kinds(stage, c, layout.split)}
    return round(layout.element * (width + max(map(inner, kinds))) * layout.tokens)
