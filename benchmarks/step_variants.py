"""Shapes and variants of `benchmarks.step`: what its table has rows for."""

from dataclasses import dataclass, replace

import torch


@dataclass(frozen=True)
class Shape:
    """A Llama-like model and its batch."""

    name: str
    layers: int
    hidden: int
    ffn: int
    heads: int
    vocab: int
    sequence: int
    batch: int  # samples of a step
    dtype: torch.dtype

    @property
    def tokens(self) -> int:
        return self.batch * self.sequence

    def matmul_parameters(self, layers: int) -> int:
        """Parameters that multiply each token: four attention and three SwiGLU matrices a layer,
        and the LM head; the embedding is a lookup."""
        per_layer = 4 * self.hidden**2 + 3 * self.hidden * self.ffn
        return layers * per_layer + self.vocab * self.hidden

    def flops_per_token(self, layers: int, *, causal: bool) -> float:
        """Model FLOPs of forward and backward: 6 a parameter, and attention's two products at
        12 * layers * sequence * hidden, halved where the masked half is not counted."""
        attention = 12 * layers * self.sequence * self.hidden
        return 6 * self.matmul_parameters(layers) + attention * (0.5 if causal else 1.0)


PAPER_2B = Shape("2B of arXiv 2406.12397", 32, 2048, 5504, 32, 125_696, 4096, 16, torch.bfloat16)
# Head and attention have the shares of the FLOPs that they have in the 2B model (14% and 22%).
SMALL = Shape("small", 4, 512, 1376, 8, 4096, 1024, 2, torch.float32)


@dataclass(frozen=True)
class Variant:
    """One row of the table."""

    name: str
    native: bool  # our layer spec, else Megatron's local one
    fused_head: bool = False
    unlearn: bool = False
    micro_batch: int = 1
    distributed_optimizer: bool = False
    accelerated: bool = True  # megatron_ext.runtime.optimizer, where the layers are ours
    layers: int | None = None  # the shape's where None
    recompute: bool = False  # Megatron's selective recomputation of the core attention
    reference_offload: bool = False

    def shares_model(self, other: "Variant") -> bool:
        """Whether both are steps of one model and optimizer, so that they need only one in memory."""
        step = {
            "name": other.name,
            "unlearn": other.unlearn,
            "reference_offload": other.reference_offload,
        }
        return replace(self, **step) == other


Group = tuple[str, list[Variant]]


def groups() -> list[Group]:
    """Variants by group; those of a group take turns and are compared with its first.

    On a GPU the most wanted numbers come first: a run that is cut short still has them.
    """
    return _gpu_groups() if torch.cuda.is_available() else _cpu_groups()


def _cpu_groups() -> list[Group]:
    return [
        (
            "plain step",
            [
                Variant("stock layers, stock head", native=False),
                Variant("our layers, stock optimizer", native=True, accelerated=False),
                Variant("our layers and optimizer", native=True),
                Variant("our layers, optimizer and head", native=True, fused_head=True),
            ],
        ),
        (
            "unlearning, half forget, half replay",
            [_ours("plain"), _ours("unlearn", unlearn=True)],
        ),
    ]


def _gpu_groups() -> list[Group]:
    mb4, mb2 = {"micro_batch": 4}, {"micro_batch": 2}
    return [
        (
            "unlearning, micro-batch 4",
            [
                _ours("plain, micro-batch 4", **mb4),
                _ours("unlearn, micro-batch 4", **mb4, unlearn=True),
            ],
        ),
        (
            "unlearning, micro-batch 2",
            [
                _ours("plain, micro-batch 2", **mb2),
                _ours("unlearn, micro-batch 2", **mb2, unlearn=True),
            ],
        ),
        (
            "stock, 8 of 32 layers",
            [
                Variant("stock layers, stock head, 8 layers", native=False, layers=8),
                Variant("our layers, stock head, 8 layers", native=True, layers=8),
                _ours("our layers and head, 8 layers", layers=8),
            ],
        ),
        ("micro-batch 1", [_ours("plain, micro-batch 1")]),
        # A name with "recompute" is the only way in which the stock layers fit at full depth.
        (
            "stock, recompute",
            [Variant("stock, attention recomputed", native=False, recompute=True)],
        ),
        ("stock", [Variant("stock layers, stock head", native=False)]),
        (
            "offload, micro-batch 4",
            [
                _ours("plain, micro-batch 4", **mb4),
                _ours(
                    "unlearn, offloaded, micro-batch 4", **mb4, unlearn=True, reference_offload=True
                ),
            ],
        ),
        (
            "stock optimizer",
            [_ours("plain, stock optimizer, micro-batch 4", **mb4, accelerated=False)],
        ),
        (
            "distributed optimizer",
            [
                _ours(
                    "plain, distributed optimizer, micro-batch 4", **mb4, distributed_optimizer=True
                )
            ],
        ),
    ]


def _ours(name: str, **options: object) -> Variant:
    """Our layers and head, and our optimizer unless `accelerated` says no."""
    return replace(Variant(name, native=True, fused_head=True), **options)
