"""What the vendor states of a GPU.

Dense bf16 (half of the figure "with sparsity"), memory, memory bandwidth, NVLink both ways together:
NVIDIA's data sheets "A100 Tensor Core GPU" (SXM, 40 and 80 GB), "H100 Tensor Core GPU" (SXM), "H200
Tensor Core GPU" (SXM) and "DGX B200". Network: "DGX A100" (200 Gb/s for each GPU), "DGX H100", "DGX
H200" and "DGX B200" (400 Gb/s).
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Gpu:
    """Figures of one GPU.

    Attributes:
        flops: peak of dense bf16 matrix products, FLOP/s.
        memory: bytes.
        memory_bandwidth: bytes a second.
        link: bytes a second to GPUs of the same node, each way.
        network: bytes a second to other nodes, each way.
    """

    flops: float
    memory: int
    memory_bandwidth: float
    link: float
    network: float


GPUS = {
    "A100-40": Gpu(312e12, 40 * 10**9, 1.555e12, 300e9, 25e9),
    "A100-80": Gpu(312e12, 80 * 10**9, 2.039e12, 300e9, 25e9),
    "H100": Gpu(989e12, 80 * 10**9, 3.35e12, 450e9, 50e9),
    "H200": Gpu(989e12, 141 * 10**9, 4.8e12, 450e9, 50e9),
    "B200": Gpu(2250e12, 180 * 10**9, 8e12, 900e9, 50e9),
}
# As CUDA names the ones that the figures are of; their relatives for PCIe have others.
_DEVICES = {
    "NVIDIA A100-SXM4-40GB": "A100-40",
    "NVIDIA A100-SXM4-80GB": "A100-80",
    "NVIDIA H100 80GB HBM3": "H100",
    "NVIDIA H200": "H200",
    "NVIDIA B200": "B200",
}


def of_device(name: str) -> Gpu | None:
    """Figures of the GPU that CUDA names so; ``None`` of another."""
    return GPUS.get(_DEVICES.get(name, ""))


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """What a run is planned for.

    Attributes:
        gpus: ranks of the run, all nodes.
        name: type of the GPU, or CPU.
        gpu: its figures; None for CPUs, whose memory is not checked.
        peak_flops: of a rank, FLOP/s.
        mfu: model FLOPs utilisation to assume.
        gpus_per_node: GPUs that the faster links join.
        price: of a GPU-hour, in any currency; None: no cost.
        write_bandwidth: bytes a second at which all ranks together write; None: no write time.
    """

    gpus: int
    name: str
    gpu: Gpu | None
    peak_flops: float
    mfu: float
    gpus_per_node: int = 8
    price: float | None = None
    write_bandwidth: float | None = None

    @property
    def memory(self) -> int | None:
        """Bytes of a GPU."""
        return None if self.gpu is None else self.gpu.memory
