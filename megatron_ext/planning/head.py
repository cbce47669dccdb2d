"""The head's logits: what of them exists at once.

`megatron_ext.losses.head_memory` decides in a run. That module imports torch, so the numbers that the
memory follows from are here once more; a test holds the two together.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_ext.planning.architecture import Architecture
from megatron_ext.planning.layout import Layout, Unlearning

CPU_BUDGET = 24 * 2**20
CPU_BLOCK = 2 * 2**20
DEVICE_SHARE = 0.6
REFERENCE_CHUNK = 256
# `megatron_ext.losses.blocks`: elements of a temporary of the torch arithmetic on a CPU. Triton has none.
CPU_ELEMENTS = 2**17


@dataclass(frozen=True)
class HeadLogits:
    """Bytes of the logits.

    Attributes:
        needed: of all logits of a microbatch, the reference's included.
        bytes: of what exists at once: logits, their gradients where these have another type, and, when
            the reference's logits are free again, the gradient of the weight (Megatron's fused
            accumulation hands autograd an empty tensor of that size).
        kept: whether the student's are kept for the backward pass, instead of being made twice.
    """

    needed: int
    bytes: int
    kept: bool


def head_logits(
    arch: Architecture, layout: Layout, unlearning: Unlearning | None, *, free: int | None
) -> HeadLogits:
    """The head's logits on a GPU of the last stage.

    All tokens of a microbatch have one role, so of a replayed one all have a reference. What does not
    fit the head's share of free memory is made in parts that fill it.

    Args:
        arch: the model.
        layout: the layout.
        unlearning: what unlearning adds, None for plain training.
        free: bytes of the device that nothing else takes; None where it is not known, and then all
            logits are taken to fit. A CPU has a fixed budget.
    """
    columns = arch.padded_vocab(layout.tp) // layout.tp
    unrounded = unlearning is not None and unlearning.fp32_logits
    row = columns * (4 if unrounded else layout.element)
    tokens = layout.tokens
    references = tokens if unlearning is not None and unlearning.reference else 0
    needed = (tokens + references) * row
    budget = needed if free is None else int(DEVICE_SHARE * max(0, free))
    if layout.cpu:
        budget = CPU_BUDGET
    beside = min(references, REFERENCE_CHUNK)
    kept = (tokens + beside) * row <= budget
    logits = min(needed, budget if kept or not layout.cpu else CPU_BLOCK)
    own = (
        tokens * row if kept else 0
    )  # what is made in parts is free when the weight's gradient comes
    gradients = own * layout.element // 4 if unrounded and layout.half else 0
    weight = columns * arch.hidden * layout.element
    temporaries = 0
    if layout.cpu:  # three in fp64 with a reference, one in fp32 without
        temporaries = min(tokens * columns, CPU_ELEMENTS) * (24 if references else 4)
    held = gradients + max(logits + temporaries, own + weight)
    return HeadLogits(needed, held, kept)
