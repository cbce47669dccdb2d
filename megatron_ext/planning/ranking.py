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
    EP divides the experts. Each has the least recompute with which it fits. What the given layout says of
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
    for split in _splits(arch, layout, gpus_per_node):
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
        found.append(Candidate(layout=candidate, memory=memory, time=time))
    return sorted(found, key=lambda one: (one.time.total, one.memory))


def _least_recompute(
    arch: Architecture,
    layout: Layout,
    split: dict[str, int],
    unlearning: Unlearning | None,
    memory: int,
) -> tuple[Layout, list[StageMemory]] | None:
    """The layout with the least recompute that fits, if any does or divides at all."""
    for recompute in _RECOMPUTE:
        try:
            candidate = replace(
                layout,
                **split,  # type: ignore[arg-type]
                sequence_parallel=split["tp"] > 1,
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


def _splits(arch: Architecture, layout: Layout, gpus_per_node: int) -> Iterator[dict[str, int]]:
    """Sizes that divide the model and the GPUs."""
    for tp, pp in _tp_pp(arch, layout.gpus // layout.cp, gpus_per_node):
        if layout.sequence % (tp * layout.cp):  # sequence parallelism comes with TP
            continue
        layers = arch.layers // pp
        for vpp in [1, *(v for v in range(2, layers + 1) if pp > 1 and layers % v == 0)]:
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
        for pp in range(1, gpus // tp + 1):
            if gpus % (tp * pp) == 0 and arch.layers % pp == 0:
                yield tp, pp


def _powers(limit: int) -> Iterator[int]:
    size = 1
    while size <= limit:
        yield size
        size *= 2
