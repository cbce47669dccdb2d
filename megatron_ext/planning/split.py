"""How a model's tensors are divided among ranks."""

from __future__ import annotations

from typing import NamedTuple


class Split(NamedTuple):
    """Sizes of the groups of ranks among which tensors are divided.

    Attributes:
        tp: tensor-parallel size.
        pp: pipeline-parallel size.
        vpp: chunks of a pipeline rank.
        ep: expert-parallel size: groups into which the experts of a layer are divided.
        etp: tensor-parallel size of an expert.
    """

    tp: int = 1
    pp: int = 1
    vpp: int = 1
    ep: int = 1
    etp: int = 1


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
