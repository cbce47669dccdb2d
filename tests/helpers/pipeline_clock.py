"""A clock for each stage of a pipeline: what a step takes, operation by operation, without the plan.

A stage works through Megatron's order, 1F1B or interleaved in groups of as many microbatches as there are
stages, and begins with an operation as soon as the one before has ended and its input is there. Nothing else
makes stages wait. The forward-only pass of a reference goes before the student's.
"""

from collections.abc import Callable

# Seconds of an operation, by stage, chunk and microbatch.
Seconds = Callable[[int, int, int], float]


def step_seconds(
    *,
    stages: int,
    chunks: int,
    microbatches: int,
    forward: Seconds,
    backward: Seconds,
    replayed: int = 0,
    reference: Seconds | None = None,
) -> float:
    """When the last stage to finish has finished.

    Args:
        stages: of the pipeline.
        chunks: of a stage; above 1 the schedule is interleaved.
        microbatches: of the student.
        forward: of the student's forward passes.
        backward: of its backward passes.
        replayed: microbatches of the reference.
        reference: of its forward passes.
    """
    seconds = {"F": forward, "B": backward, "R": reference or forward}
    left = [
        [("R", *work) for work in _forward_order(stages, chunks, replayed)]
        + _one_forward_one_backward(stages, chunks, microbatches, stage)
        for stage in range(stages)
    ]
    clock, ended = [0.0] * stages, dict[tuple[str, int, int, int], float]()
    while any(left):
        before = len(ended)
        for stage, operations in enumerate(left):
            while operations:
                kind, chunk, microbatch = operations[0]
                source = _source(kind, chunk, microbatch, stage, stages, chunks)
                if source is not None and source not in ended:
                    break
                ready = 0.0 if source is None else ended[source]
                clock[stage] = max(clock[stage], ready) + seconds[kind](stage, chunk, microbatch)
                ended[kind, chunk, microbatch, stage] = clock[stage]
                del operations[0]
        assert len(ended) > before, "stages wait for each other"
    return max(clock)


def _forward_order(stages: int, chunks: int, microbatches: int) -> list[tuple[int, int]]:
    """Chunk and microbatch of each forward pass of a stage."""
    return [
        (chunk, microbatch)
        for start in range(0, microbatches, stages)
        for chunk in range(chunks)
        for microbatch in range(start, min(start + stages, microbatches))
    ]


def _one_forward_one_backward(
    stages: int, chunks: int, microbatches: int, stage: int
) -> list[tuple[str, int, int]]:
    order = _forward_order(stages, chunks, microbatches)
    forward = [("F", *work) for work in order]
    backward = [("B", chunks - 1 - chunk, microbatch) for chunk, microbatch in order]
    behind = stages - stage - 1
    ahead = min(behind if chunks == 1 else 2 * behind + (chunks - 1) * stages, len(order))
    steady = zip(forward[ahead:], backward, strict=False)
    pairs = [operation for pair in steady for operation in pair]
    return [*forward[:ahead], *pairs, *backward[len(order) - ahead :]]


def _source(
    kind: str, chunk: int, microbatch: int, stage: int, stages: int, chunks: int
) -> tuple[str, int, int, int] | None:
    """The operation whose output this one takes."""
    if kind != "B":
        if stage:
            return kind, chunk, microbatch, stage - 1
        return (kind, chunk - 1, microbatch, stages - 1) if chunk else None
    if stage < stages - 1:
        return kind, chunk, microbatch, stage + 1
    if chunk < chunks - 1:
        return kind, chunk + 1, microbatch, 0
    return "F", chunk, microbatch, stage
