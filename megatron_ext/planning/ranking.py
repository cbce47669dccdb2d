"""Which layouts of a number of GPUs fit, and which of them the model of a step takes for the fastest."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from megatron_ext.exceptions import ConfigError
from megatron_ext.gpus import Gpu
from megatron_ext.planning.architecture import Architecture
from megatron_ext.planning.layout import Layout, Recompute, Unlearning
from megatron_ext.planning.memory import StageMemory, all_stages
from megatron_ext.planning.steps import StepTime, model_step

_RECOMPUTE: tuple[Recompute, ...] = ("none", "selective", "full")


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A layout that fits.

    Attributes:
        layout: the layout.
        memory: bytes on a GPU of the stage that needs most.
        time: of a step, modelled.
    """

    layout: Layout
    memory: int
    time: StepTime


def rank_layouts(
    arch: Architecture,
    layout: Layout,
    unlearning: Unlearning | None = None,
    *,
    gpu: Gpu,
    gpus_per_node: int = 8,
    utilisation: float,
) -> list[Candidate]:
    """All layouts that divide model, batch and GPUs and fit in memory, the fastest first.

    TP stays within a node and divides heads and query groups; microbatches are powers of two; of a mixture
    EP divides the experts. Each has the least recompute with which it fits. Of the splits into stages, even
    ones and those of `stage_splits`, only the fastest that fits is listed. What the given layout says of
    context parallelism, the experts' TP, optimizer, overlap and precision stays. Equal times are ordered by
    memory.

    Args:
        arch: the model.
        layout: the number of GPUs, the batch, and what stays.
        unlearning: what unlearning adds, None for plain training.
        gpu: the vendor's figures.
        gpus_per_node: GPUs that the faster links join.
        utilisation: of the peak, in matrix products and attention.
    """
    found = []
    for sizes in _sizes(arch, layout, gpus_per_node):
        of_sizes = []
        for first, last in stage_splits(arch, layout, sizes, unlearning):
            split = {**sizes, "first": first, "last": last}
            fitting = _least_recompute(arch, layout, split, unlearning, gpu.memory)
            if fitting is None:
                continue
            candidate, stages = fitting
            time = model_step(
                arch,
                candidate,
                unlearning,
                gpu=gpu,
                gpus_per_node=gpus_per_node,
                utilisation=utilisation,
            )
            memory = max(stage.total for stage in stages)
            of_sizes.append(Candidate(layout=candidate, memory=memory, time=time))
        if of_sizes:
            # Sums of the same parts in another order differ in their last digits.
            found.append(min(of_sizes, key=lambda one: (round(one.time.total, 9), one.memory)))
    return sorted(found, key=lambda one: (one.time.total, one.memory))


def stage_splits(
    arch: Architecture, layout: Layout, sizes: dict[str, int], unlearning: Unlearning | None
) -> list[tuple[int | None, int | None]]:
    """Layers of the first and of the last stage, None where they are as many as of those between.

    The even split, where there is one; the fastest in which the last stage has a number of its own, for it
    has the head; and the fastest in which the first has one too, so that more of them divide. Layers are
    taken to be equally slow. Of equally fast splits the first stage has fewer, for it keeps the activations
    of most microbatches.

    Args:
        arch: the model.
        layout: the number of GPUs and the batch.
        sizes: of the parallel groups and the microbatch, from `_sizes`.
        unlearning: what unlearning adds, None for plain training.
    """
    pp, vpp = sizes["pp"], sizes["vpp"]
    units = arch.layers // vpp
    even: list[tuple[int | None, int | None]] = [] if units % pp else [(None, None)]
    if pp == 1:
        return even
    layers = sum(arch.layer_flops(layout.sequence, arch.kind(i)) for i in range(arch.layers))
    head = arch.head_flops(tp=sizes["tp"]) / layers * arch.layers  # in layers
    copies = layout.gpus // (sizes["tp"] * layout.cp * pp)
    count, replayed = layout.global_batch // (sizes["micro_batch"] * copies), 0
    if unlearning is not None and unlearning.reference:
        replayed = count - unlearning.forget_batch // (sizes["micro_batch"] * copies)
    run = max(replayed, pp if replayed and vpp > 1 else 0)

    def passes(most: int, last: int) -> float:
        """Forward passes of a layer that a step takes, but for what is the same of all splits (`steps`)."""
        slowest = max(3 * most, 3 * (last + head))
        with_logits = max(slowest, 3 * last + 4 * head)
        busy = (count - replayed) * slowest + replayed * with_logits
        return busy - slowest / vpp + run * max(most, last)

    alone, both = [], []
    for last in range(1, units - pp + 2):
        if (units - last) % (pp - 1) == 0:
            between = (units - last) // (pp - 1)
            alone.append((passes(between * vpp, last * vpp), last * vpp))
        for first in range(1, units - last - pp + 3) if pp > 2 else ():
            if (units - first - last) % (pp - 2) == 0:
                most = max(first, (units - first - last) // (pp - 2))
                both.append((passes(most * vpp, last * vpp), first * vpp, last * vpp))
    found = [*even]
    if alone:
        found.append((None, min(alone)[1]))
    if both:
        found.append(min(both)[1:])
    return found


def _least_recompute(
    arch: Architecture,
    layout: Layout,
    split: dict[str, int | None],
    unlearning: Unlearning | None,
    memory: int,
) -> tuple[Layout, list[StageMemory]] | None:
    """The layout with the least recompute that fits, if any does or divides at all."""
    for recompute in _RECOMPUTE:
        try:
            candidate = replace(
                layout,
                **split,  # type: ignore[arg-type]
                sequence_parallel=split["tp"] != 1,
                recompute=recompute,
                recompute_method="uniform",
                recompute_layers=1,
            )
            stages = all_stages(arch, candidate, unlearning, capacity=memory)
        except ConfigError:  # the batch or the forgotten samples do not divide
            return None
        if max(stage.total for stage in stages) <= memory:
            return candidate, stages
    return None


def _sizes(arch: Architecture, layout: Layout, gpus_per_node: int) -> Iterator[dict[str, int]]:
    """Sizes that divide the GPUs, and the model but for its layers."""
    for tp, pp in _tp_pp(arch, layout.gpus // layout.cp, gpus_per_node):
        if layout.sequence % (tp * layout.cp):  # sequence parallelism comes with TP
            continue
        most = arch.layers // pp if pp > 1 else 1
        for vpp in (v for v in range(1, most + 1) if arch.layers % v == 0):
            for ep in _expert_groups(arch, layout, tp=tp, pp=pp):
                for micro in _powers(layout.global_batch):
                    yield {"tp": tp, "pp": pp, "vpp": vpp, "ep": ep, "micro_batch": micro}


def _expert_groups(arch: Architecture, layout: Layout, *, tp: int, pp: int) -> Iterator[int]:
    """EP sizes that divide the experts of a layer and the ranks of a stage."""
    experts = 1 if arch.mixture is None else arch.mixture.experts
    etp = layout.expert_tp or tp
    for ep in range(1, experts + 1):
        if experts % ep == 0 and (arch.mixture is None or layout.gpus % (etp * ep * pp) == 0):
            yield ep


def _tp_pp(arch: Architecture, gpus: int, gpus_per_node: int) -> Iterator[tuple[int, int]]:
    for tp in range(1, min(gpus, gpus_per_node) + 1):
        # A TP group that crosses nodes is not a layout anybody wants.
        whole = gpus_per_node % tp == 0 and gpus % tp == 0
        if not whole or arch.heads % tp or arch.query_groups % tp:
            continue
        for pp in range(1, min(gpus // tp, arch.layers) + 1):
            if gpus % (tp * pp) == 0:
                yield tp, pp


def _powers(limit: int) -> Iterator[int]:
    size = 1
    while size <= limit:
        yield size
        size *= 2
