"""How a model's tensors are divided among ranks."""

from __future__ import annotations

from typing import NamedTuple

from megatron_ext.stages import CHUNKS, FIRST, LAST, stage_layers


class Split(NamedTuple):
    """Sizes of the groups of ranks among which tensors are divided.

    Attributes:
        tp: tensor-parallel size.
        pp: pipeline-parallel size.
        vpp: chunks of a pipeline rank.
        ep: expert-parallel size: groups into which the experts of a layer are divided.
        etp: tensor-parallel size of an expert.
        first: layers of the first stage, None: as many as one between.
        last: layers of the last stage, None: as many as one between.
    """

    tp: int = 1
    pp: int = 1
    vpp: int = 1
    ep: int = 1
    etp: int = 1
    first: int | None = None
    last: int | None = None

    def layers(self, total: int) -> list[int]:
        """Layers of each stage, all of its chunks together, of as many in all."""
        return stage_layers(total, self.pp, first=self.first, last=self.last)

    def flags(self) -> str:
        """Flags of uneven stages, and of their chunks, which have another one then; empty of even stages."""
        own = [
            f"{flag} {n}" for flag, n in ((FIRST, self.first), (LAST, self.last)) if n is not None
        ]
        return " ".join([*own, f"{CHUNKS} {self.vpp}"] if own and self.vpp > 1 else own)

    def chunk_layers(self, total: int, stage: int, chunk: int) -> range:
        """Layers of a model chunk: the first chunks of all stages come before their second ones."""
        counts = self.layers(total)
        start = (chunk * total + sum(counts[:stage])) // self.vpp
        return range(start, start + counts[stage] // self.vpp)


class Tensor(NamedTuple):
    """A parameter on one GPU.

    Attributes:
        elements: elements of this GPU's shard.
        shared: whether it is one of the two copies of a tied embedding on different stages.
        expert: whether it has the data-parallel ranks of experts.
    """

    elements: int
    shared: bool = False
    expert: bool = False
