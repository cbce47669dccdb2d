"""The head's logits: what of them exists at once in a training step."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_ext.head_chunks import training_chunk
from megatron_ext.planning.architecture import Architecture
from megatron_ext.planning.layout import Layout, Unlearning

# `megatron_ext.losses.blocks`: elements of a temporary of the torch arithmetic on a CPU. Triton has none.
CPU_ELEMENTS = 2**17


@dataclass(frozen=True)
class HeadLogits:
    """Bytes of the logits.

    Attributes:
        needed: of all logits of a microbatch, the reference's included.
        logits: of those that exist at once.
        bytes: of all that exists at once: logits, their gradients where these have another type, and the
            gradient of the weight. Where all logits fit, that is made when the reference's are free again
            (Megatron's fused accumulation hands autograd an empty tensor of its size); in chunks it is summed
            in fp32 from the first on.
    """

    needed: int
    logits: int
    bytes: int


def head_logits(
    arch: Architecture, layout: Layout, unlearning: Unlearning | None, *, capacity: int | None
) -> HeadLogits:
    """The head's logits on a GPU of the last stage.

    All tokens of a microbatch have one role, so of a replayed one all have a reference.

    Args:
        arch: the model.
        layout: the layout.
        unlearning: what unlearning adds, None for plain training.
        capacity: bytes of the GPU; None where they are not known, and then all logits are taken to fit.
    """
    columns = arch.padded_vocab(layout.tp) // layout.tp
    unrounded = unlearning is not None and unlearning.fp32_logits
    row = columns * (4 if unrounded else layout.element)
    tokens, weight = layout.tokens, columns * arch.hidden
    both = 2 if unlearning is not None and unlearning.reference else 1
    needed = tokens * both * row
    chunk = tokens
    if layout.cpu or capacity is not None:
        chunk = training_chunk(
            tokens,
            columns,
            arch.hidden,
            tokens * (both - 1),
            element_size=row // columns,
            gradient_size=4,
            gpu_memory=None if layout.cpu else capacity,
        )
    gradients = chunk * row * layout.element // 4 if unrounded and layout.half else 0
    temporaries = 0
    if layout.cpu:  # three in fp64 with a reference, one in fp32 without
        temporaries = min(chunk * columns, CPU_ELEMENTS) * (24 if both == 2 else 4)
    logits = chunk * both * row
    if chunk >= tokens:
        held = gradients + max(logits + temporaries, tokens * row + weight * layout.element)
    else:
        held = weight * 4 + gradients + logits + temporaries
    return HeadLogits(needed, logits, held)
