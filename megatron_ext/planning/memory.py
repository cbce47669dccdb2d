"""Memory on one GPU of every pipeline stage, by part.

Not counted: the CUDA context and NCCL's buffers (1-3 GiB a GPU), fragmentation, and the tokens
themselves. `gpus` counts a GPU's gigabytes as 10^9 bytes, less than the driver reports; the
difference is the room for these.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_ext.planning.activations import (
    final_norm_bytes,
    forward_bytes,
    kept_bytes,
    working_bytes,
)
from megatron_ext.planning.architecture import Architecture
from megatron_ext.planning.head import HeadLogits, head_logits
from megatron_ext.planning.layout import Layout, Unlearning, check
from megatron_ext.planning.state import state_bytes


@dataclass(frozen=True, kw_only=True)
class StageMemory:
    """Bytes on one GPU of a pipeline stage.

    Attributes:
        stage: pipeline rank.
        parts: by part, at the peak of the training pass.
        reference_pass: all bytes while the reference runs, before the training pass; 0 without one.
        host: bytes of pinned host memory.
        head: the head's logits, on the last stage.
    """

    stage: int
    parts: dict[str, int]
    reference_pass: int = 0
    host: int = 0
    head: HeadLogits | None = None

    @property
    def total(self) -> int:
        """Bytes at the peak of a step."""
        return max(sum(self.parts.values()), self.reference_pass)


def stage_memory(
    arch: Architecture,
    layout: Layout,
    stage: int,
    unlearning: Unlearning | None = None,
    *,
    capacity: int | None = None,
) -> StageMemory:
    """Memory of a pipeline stage.

    The reference's final hidden states wait on the last stage, one vector for each replay token of
    this data-parallel rank. With `--reference-offload` only its output layer stays on the device
    while the student trains; all of it is there while the reference runs, when no activation of the
    student is. The head's part is the final norm's tensors and the logits.

    Args:
        arch: the model.
        layout: the layout.
        stage: pipeline rank.
        unlearning: what unlearning adds, None for plain training.
        capacity: bytes of a GPU, by which the head chooses its chunk; None: it takes what it needs.
    """
    parts = state_bytes(arch, layout, stage)
    state = sum(parts.values())
    parts["activations"] = kept_bytes(arch, layout, stage)
    reference_pass = host = 0
    if unlearning is not None and unlearning.reference:
        held, all_weights, cache, host = _reference(arch, layout, stage, unlearning)
        parts["reference"], parts["hidden-state cache"] = held, cache
        reference_pass = state + all_weights + cache + forward_bytes(arch, layout, stage)
    working, head = working_bytes(arch, layout, stage), None
    if stage == layout.pp - 1:
        head = head_logits(arch, layout, unlearning, capacity=capacity)
        parts["head chunk"] = final_norm_bytes(arch, layout) + head.bytes
    # The head's memory is free again when the layers' backward passes begin.
    parts["layer at work"] = max(0, working - parts.get("head chunk", 0))
    return StageMemory(
        stage=stage, parts=parts, reference_pass=reference_pass, host=host, head=head
    )


def _reference(
    arch: Architecture, layout: Layout, stage: int, unlearning: Unlearning
) -> tuple[int, int, int, int]:
    """Bytes of weights that stay, of all weights, of hidden states on the device, and of host memory."""
    e, last = layout.element, stage == layout.pp - 1
    tensors = [
        e * tensor.elements
        for chunk in range(layout.vpp)
        for tensor in arch.chunk_tensors(stage, chunk, layout.split)
    ]
    held, host = sum(tensors), 0
    if unlearning.reference_offload:
        held = e * arch.padded_vocab(layout.tp) // layout.tp * arch.hidden if last else 0
        host = sum(_pinned(size, layout) for size in tensors) - _pinned(held, layout)
    if not last:
        return held, sum(tensors), 0, host
    replayed = (layout.global_batch - unlearning.forget_batch) // layout.data_parallel
    one = layout.tokens * arch.hidden * e // layout.sequence_split
    # The interleaved schedule is given at least as many microbatches as it has stages.
    count = max(replayed // layout.micro_batch, layout.pp if layout.vpp > 1 else 0)
    if unlearning.hidden_offload:
        return held, sum(tensors), one, host + count * _pinned(one, layout)
    return held, sum(tensors), count * one, host


def _pinned(size: int, layout: Layout) -> int:
    """Bytes of pinned host memory that torch takes for a tensor: the next power of two."""
    return size if layout.cpu or not size else 1 << (size - 1).bit_length()


def all_stages(
    arch: Architecture,
    layout: Layout,
    unlearning: Unlearning | None = None,
    *,
    capacity: int | None = None,
) -> list[StageMemory]:
    """Memory of every pipeline stage.

    Raises:
        ConfigError: the layout does not divide the model.
    """
    check(arch, layout, unlearning)
    return [
        stage_memory(arch, layout, stage, unlearning, capacity=capacity)
        for stage in range(layout.pp)
    ]


def checkpoint_bytes(arch: Architecture, *, tp: int = 1, half: bool) -> int:
    """Bytes of a checkpoint with optimizer: weights, moments, and with half precision the fp32 master.

    A model of 3,344,064 fp32 parameters was saved in 40,407,775 bytes; this gives 40,128,768.
    """
    return arch.parameters(tp) * (14 if half else 12)
