"""The time of a step: from a model FLOPs utilisation, and from a model of one layout against another.

The model is arithmetic; nothing of it was measured. Its parts and where they come from:

- Matrix products and attention run at `utilisation` of the peak, whatever the layout. The slowest
  stage sets the pace: with a large vocabulary and stages of equally many layers that is the last one.
- Recompute makes a layer's forward pass again (full), or its attention's (selective, 2205.05198).
- Tensor parallelism: four all-reduces of `s b h` a layer and microbatch, two each way, or as many
  pairs of all-gather and reduce-scatter (2104.04473, section 3.2; 2205.05198, section 4.2.2), through
  a node's links, nothing hidden. A ring moves `2 (t - 1) / t` of the bytes. Without experts that all tokens
  have, a mixture has attention's alone.
- Context parallelism: a layer gathers keys and values forward, and again backward, where their gradients
  are reduced and scattered; nothing hidden, over the links of a node if TP x CP ranks are in one.
- Expert parallelism: a layer sends the rows of its tokens to their experts and back, forward and backward,
  nothing hidden, over the links of a node if EP x the experts' TP ranks are in one; with the all-gather
  dispatcher the tokens of all of these ranks instead. Experts get equal shares of the tokens.
- Every microbatch adds its gradients to the sum: read and written, in fp32 8 bytes a parameter.
- The pipeline: the slowest stage works `m` times and waits while a microbatch passes the others, `1 / v` of
  which it waits with `v` chunks; of equal stages `(p - 1) / v` times (2104.04473, section 2.2). Each chunk's
  output and its gradient cross the network.
- Data parallelism: gradients are reduced and weights gathered once a step, over the links of a node or
  through the adapters of all of the group's GPUs in it, for a ring leaves a node once; with overlap behind
  the compute of one microbatch.
- The reference's forward passes over the replay microbatches are a pipeline of their own, but it costs no
  second bubble. Nothing makes the stages wait for each other between both pipelines: Megatron's schedules
  end with the last microbatch's output on its way to the next stage, and the count of the step's tokens is
  summed among the ranks of the last stage alone. So the student fills the pipeline while the reference drains
  it. (With `--timing-log-level 1` Megatron puts a barrier there.) The reference's logits are made in the
  student's head, and cost what they make the last stage slower than the slowest one.

Left out: kernels become less efficient with small microbatches and large TP, memory traffic of the
optimizer's step, data loading, logging, checkpoints.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_ext.gpus import Gpu
from megatron_ext.planning.architecture import Architecture
from megatron_ext.planning.layout import Layout, Unlearning
from megatron_ext.planning.mixture import Mixture


def step_flops(arch: Architecture, layout: Layout, unlearning: Unlearning | None = None) -> float:
    """FLOPs of a step; the reference adds a forward pass, a third, for each replay token."""
    passes = float(layout.global_batch)
    if unlearning is not None and unlearning.reference:
        passes += (layout.global_batch - unlearning.forget_batch) / 3
    return passes * layout.sequence * arch.flops_per_token(layout.sequence, tp=layout.tp)


@dataclass(frozen=True, kw_only=True)
class StepTime:
    """Seconds of a modelled step.

    Attributes:
        compute: of the slowest stage: products, recompute, gradient sums.
        tensor_parallel: of its tensor-parallel communication.
        context_parallel: of its context-parallel communication.
        expert_parallel: of sending rows to experts and back.
        bubble: waiting for the first and the last microbatch of the pipeline.
        pipeline: sending activations and their gradients between stages.
        data_parallel: reducing gradients and gathering weights, as far as not hidden.
        reference: the reference's forward pass, all of the above included.
    """

    compute: float
    tensor_parallel: float
    context_parallel: float
    expert_parallel: float
    bubble: float
    pipeline: float
    data_parallel: float
    reference: float

    @property
    def total(self) -> float:
        """Seconds of the step."""
        return sum(vars(self).values())


def model_step(
    arch: Architecture,
    layout: Layout,
    unlearning: Unlearning | None,
    *,
    gpu: Gpu,
    gpus_per_node: int,
    utilisation: float,
) -> StepTime:
    """Model a step; see the module for what is in it.

    Args:
        arch: the model.
        layout: the layout.
        unlearning: what unlearning adds.
        gpu: the vendor's figures.
        gpus_per_node: GPUs that the faster links join.
        utilisation: of the peak, in matrix products and attention.
    """
    rate = gpu.flops * utilisation * layout.tp
    m, p, v = layout.microbatches, layout.pp, layout.vpp
    # One each way, and one more where the forward pass is made again.
    tensor_passes = 3 if layout.recompute == "full" else 2
    # Forward, backward again, and the gradient's way back; and once more where a layer is made again.
    context_passes = 3 if layout.recompute == "none" else 4
    reduction = _reduction(arch, layout, gpu)
    gather = _gather(arch, layout, gpu, gpus_per_node)
    # Both ways forward, both backward; with the forward pass again where a layer is made again.
    exchange = 2 * _exchange(arch, layout, gpu, gpus_per_node)
    busy, forward = [], []  # of each stage; of the reference's forward pass
    for stage in range(p):
        work = _layer_work(arch, layout, stage) / rate
        work += 2 * layout.gradient * _parameters(arch, layout, stage) / gpu.memory_bandwidth
        if stage == p - 1:  # forward, and backward of both factors
            work += 3 * _head_flops(arch, layout) / rate
        kinds = _kinds(arch, layout, stage)
        reduced, gathered = _reductions(kinds) * reduction, len(kinds) * gather
        sent = sum(kind is not None for kind in kinds) * exchange
        busy.append(
            (work, tensor_passes * reduced, context_passes * gathered, tensor_passes * sent)
        )
        layers = sum(map(sum, _layer_flops(arch, layout, stage))) / rate
        forward.append(layers + reduced + gathered + sent)
    slowest = max(busy, key=sum)
    compute, tensor, context, expert = slowest
    far = gpu.link if layout.gpus <= gpus_per_node else gpu.network
    output = layout.tokens * arch.hidden * layout.element / layout.sequence_split
    passed_on = 2 * v * output / far if p > 1 else 0.0
    reference = 0.0
    if unlearning is not None and unlearning.reference:
        with_logits = sum(busy[-1]) + _head_flops(arch, layout) / rate
        count, run = _replayed(layout, unlearning)
        reference = run * (max(forward) + passed_on / 2)
        reference += count * max(0.0, with_logits - sum(slowest))
    return StepTime(
        compute=m * compute,
        tensor_parallel=m * tensor,
        context_parallel=m * context,
        expert_parallel=m * expert,
        bubble=(sum(map(sum, busy)) - sum(slowest)) / v,
        pipeline=m * passed_on,
        data_parallel=_data_parallel(arch, layout, gpu, gpus_per_node, hidden=sum(slowest)),
        reference=reference,
    )


def _replayed(layout: Layout, unlearning: Unlearning) -> tuple[int, int]:
    """Replayed microbatches of a copy of the model, and those that its reference runs.

    The interleaved schedule is given at least as many as it has stages.
    """
    replayed = (layout.global_batch - unlearning.forget_batch) // layout.data_parallel
    count = replayed // layout.micro_batch
    return count, max(count, layout.pp if layout.vpp > 1 else 0)


def _layer_flops(arch: Architecture, layout: Layout, stage: int) -> list[list[float]]:
    """FLOPs of the forward pass of a stage's layers, by chunk; all TP ranks, for a microbatch."""
    return [
        [
            arch.layer_flops(layout.sequence, kind) * layout.tokens
            for kind in arch.kinds(stage, chunk, layout.split)
        ]
        for chunk in range(layout.vpp)
    ]


def _layer_work(arch: Architecture, layout: Layout, stage: int) -> float:
    """FLOPs of a stage's layers for a microbatch, all TP ranks: 3 forward passes, and what is made again."""
    chunks = _layer_flops(arch, layout, stage)
    once = sum(map(sum, chunks))
    if layout.recompute == "none":
        return 3 * once
    if layout.recompute == "selective":
        attention = 2.0 * layout.sequence * arch.query * layout.tokens
        return 3 * once + attention * sum(map(len, chunks))
    if layout.recompute_method == "uniform":
        return 4 * once
    return 3 * once + sum(sum(chunk[: layout.recompute_layers]) for chunk in chunks)


def _head_flops(arch: Architecture, layout: Layout) -> float:
    return arch.head_flops(tp=layout.tp) * layout.tokens


def _parameters(arch: Architecture, layout: Layout, stage: int, *, expert: bool = False) -> int:
    """Parameters on one GPU of a stage, or those of them that have the data-parallel ranks of experts."""
    if not expert:
        return arch.stage_parameters(stage, layout.split)
    return sum(
        tensor.elements
        for chunk in range(layout.vpp)
        for tensor in arch.chunk_tensors(stage, chunk, layout.split)
        if tensor.expert
    )


def _kinds(arch: Architecture, layout: Layout, stage: int) -> list[Mixture | None]:
    """Which mixtures the layers of a stage are, those of all of its chunks."""
    return [kind for chunk in range(layout.vpp) for kind in arch.kinds(stage, chunk, layout.split)]


def _reductions(kinds: list[Mixture | None]) -> int:
    """All-reduces forward of a stage: behind attention, and behind what all tokens pass."""
    return sum(1 if kind is not None and not kind.shared else 2 for kind in kinds)


def _reduction(arch: Architecture, layout: Layout, gpu: Gpu) -> float:
    """Seconds of one all-reduce of a microbatch's residual stream over a ring of TP ranks."""
    moved = 2 * (layout.tp - 1) / layout.tp * layout.tokens * arch.hidden * layout.element
    return moved / gpu.link


def _gather(arch: Architecture, layout: Layout, gpu: Gpu, gpus_per_node: int) -> float:
    """Seconds of gathering a layer's keys and values of a microbatch over a ring of CP ranks."""
    received = (layout.cp - 1) * layout.tokens * 2 * arch.key / layout.tp * layout.element
    return received / (gpu.link if layout.tp * layout.cp <= gpus_per_node else gpu.network)


def _exchange(arch: Architecture, layout: Layout, gpu: Gpu, gpus_per_node: int) -> float:
    """Seconds of sending a microbatch's rows of one layer to their experts."""
    mixture, ranks = arch.mixture, layout.ep * layout.etp
    if mixture is None or ranks == 1:
        return 0.0
    tokens = layout.tokens / layout.sequence_split
    if mixture.dispatcher == "allgather":
        rows = (ranks - 1) * tokens
    else:
        rows = (layout.ep - 1) / layout.ep * tokens * mixture.topk
        rows += (layout.etp - 1) * tokens * mixture.topk
    link = gpu.link if ranks <= gpus_per_node else gpu.network
    return rows * arch.hidden * layout.element / link


def _data_link(ranks: int, stride: int, gpu: Gpu, gpus_per_node: int) -> float:
    """Bytes a second of a ring of data-parallel ranks, `stride` apart, so that neighbours share a node.

    NCCL makes as many rings as there are adapters, and each crosses to the next node by another one.
    """
    together = max(1, gpus_per_node // stride)
    if ranks <= together:
        return gpu.link
    return min(gpu.link, together * gpu.network)


def _data_parallel(
    arch: Architecture, layout: Layout, gpu: Gpu, gpus_per_node: int, *, hidden: float
) -> float:
    """Seconds of gradient reduction and of gathering weights that are not hidden behind `hidden`.

    Experts are reduced among ranks of their own.
    """

    def passed(stage: int) -> float:
        """Seconds in which each byte of an element passes once around its ring."""
        expert = _parameters(arch, layout, stage, expert=True)
        dense = _parameters(arch, layout, stage) - expert
        seconds = 0.0
        for count, ranks, stride in (
            (dense, layout.shards, layout.tp),
            (expert, layout.expert_shards, layout.etp * layout.ep),
        ):
            seconds += (ranks - 1) / ranks * count / _data_link(ranks, stride, gpu, gpus_per_node)
        return seconds

    share = max(map(passed, range(layout.pp)))
    if not layout.distributed_optimizer:
        reduce, gather = 2 * layout.gradient * share, 0.0
    else:
        reduce, gather = layout.gradient * share, layout.element * share
    exposed = 0.0
    for seconds, overlapped, behind in (
        (reduce, layout.overlap_gradients, hidden * 2 / 3),  # a backward pass
        (gather, layout.overlap_parameters, hidden / 3),  # a forward pass
    ):
        exposed += max(0.0, seconds - behind) if overlapped else seconds
    return exposed
