"""What a run will cost before it starts: parameters, memory of each stage, time, data epochs.

For the architecture of arXiv 2406.12397 (table 1): a Llama-like decoder with RoPE, RMSNorm, SwiGLU
and no biases. Plain arithmetic; imports neither torch nor Megatron.

Not counted: the CUDA context and NCCL's buffers (1-3 GiB a GPU), fragmentation, and the head's
logits, which are made in chunks of what memory is left (`megatron_ext.losses.head_memory`).

Symbols: h hidden size, f FFN size, q = heads x head size, k = query groups x head size, a heads,
L layers, V padded vocabulary, s sequence length, e bytes of an activation.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from megatron_ext.data.indexed import read_index_summary
from megatron_ext.exceptions import ConfigError

Recompute = Literal["none", "selective", "full"]


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """Sizes of the model.

    Attributes:
        layers: transformer layers.
        hidden: width of the residual stream.
        ffn: width of the feed-forward layer, of each of its two halves.
        heads: query heads.
        query_groups: key-value heads.
        head_size: width of a head.
        vocab_size: ids of the tokenizer.
        vocab_multiple: `--make-vocab-size-divisible-by`.
        tied: whether the output layer is the embedding.
    """

    layers: int
    hidden: int
    ffn: int
    heads: int
    query_groups: int
    head_size: int
    vocab_size: int
    vocab_multiple: int = 128
    tied: bool = False

    def padded_vocab(self, tp: int = 1) -> int:
        """V: ids up to the next multiple of `vocab_multiple * tp`, as Megatron pads."""
        return math.ceil(self.vocab_size / (self.vocab_multiple * tp)) * self.vocab_multiple * tp

    @property
    def layer_matrices(self) -> int:
        """Parameters of a layer's matrices, which TP splits: `h (q + 2k) + q h + 3 h f`."""
        query, key = self.heads * self.head_size, self.query_groups * self.head_size
        return self.hidden * (2 * query + 2 * key + 3 * self.ffn)

    def parameters(self, tp: int = 1) -> int:
        """Exact number of parameters with the vocabulary padded for `tp`."""
        embeddings = self.padded_vocab(tp) * self.hidden * (1 if self.tied else 2)
        return self.layers * (self.layer_matrices + 2 * self.hidden) + self.hidden + embeddings

    def stage_parameters(self, stage: int, *, tp: int, pp: int) -> int:
        """Parameters on one GPU of a pipeline stage; norms are on every TP rank.

        Tied embeddings have a copy on the last stage.
        """
        last = stage == pp - 1
        count = self.layers // pp * (self.layer_matrices // tp + 2 * self.hidden)
        tables = (stage == 0) + (last and not (self.tied and pp == 1))
        count += tables * self.padded_vocab(tp) // tp * self.hidden
        return count + (self.hidden if last else 0)

    def flops_per_token(self, sequence: int, *, tp: int = 1) -> float:
        """FLOPs of forward and backward for one token.

        6 a parameter of a matrix product (arXiv 2001.08361, section 2.1; the embedding is a lookup)
        and `6 s q` a layer for causal attention: scores and context are `2 s q` each forward over
        `s` keys, half of which the mask leaves out, and the backward pass is twice the forward.
        """
        matrices = self.layers * self.layer_matrices + self.padded_vocab(tp) * self.hidden
        return 6.0 * (matrices + self.layers * sequence * self.heads * self.head_size)


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How a run is spread over GPUs.

    Raises:
        ConfigError: the batch or the GPUs do not divide.
    """

    gpus: int
    micro_batch: int
    global_batch: int
    sequence: int
    tp: int = 1
    pp: int = 1
    sequence_parallel: bool = False
    distributed_optimizer: bool = False
    bf16: bool = False
    recompute: Recompute = "none"

    def __post_init__(self) -> None:
        if self.gpus % (self.tp * self.pp):
            raise ConfigError(
                f"GPUs: expected a multiple of {self.tp * self.pp} (TP {self.tp} x PP {self.pp}), "
                f"found {self.gpus}"
            )
        unit = self.micro_batch * self.data_parallel
        if self.global_batch % unit:
            raise ConfigError(
                f"--global-batch-size: expected a multiple of {unit} (micro-batch "
                f"{self.micro_batch} x DP {self.data_parallel}), found {self.global_batch}"
            )

    @property
    def data_parallel(self) -> int:
        """Copies of the model."""
        return self.gpus // (self.tp * self.pp)

    @property
    def microbatches(self) -> int:
        """Microbatches of each copy in a step."""
        return self.global_batch // (self.micro_batch * self.data_parallel)

    @property
    def tokens_per_step(self) -> int:
        """Tokens of a global batch."""
        return self.global_batch * self.sequence


@dataclass(frozen=True, kw_only=True)
class Unlearning:
    """What an unlearning step has beside plain training.

    Attributes:
        forget_batch: forgotten samples of a global batch.
        reference: whether a frozen reference model takes part (mitigation weight above 0).
        reference_offload: whether its weights wait on the host.
    """

    forget_batch: int
    reference: bool = True
    reference_offload: bool = False


def activation_bytes_per_token(arch: Architecture, layout: Layout) -> float:
    """Bytes that one layer keeps for the backward pass, for each token, on one GPU.

    Counted tensor by tensor as in arXiv 2205.05198, section 4.1, for layers without dropout, with
    SwiGLU and an attention that keeps no scores: input and output of two norms and their fp32
    scales (4 e h + 8); query, key, value and context (e (2q + 2k), and e q more with grouped
    queries, which are copied out of the projection's buffer); the softmax's fp32 log-sum-exp (4 a);
    both halves before SwiGLU and its output (3 e f). TP divides all but the norms' tensors, which
    sequence parallelism divides (table 2 there). Full recompute keeps a layer's input alone;
    selective recompute drops nothing that this attention keeps.
    """
    element = 2 if layout.bf16 else 4
    norms_split = layout.tp if layout.sequence_parallel else 1
    if layout.recompute == "full":
        return element * arch.hidden / norms_split
    query, key = arch.heads * arch.head_size, arch.query_groups * arch.head_size
    queries = 3 * query if arch.query_groups < arch.heads else 2 * query
    split = element * (queries + 2 * key + 3 * arch.ffn) + 4 * arch.heads
    return (4 * element * arch.hidden + 8) / norms_split + split / layout.tp


def stage_memory(
    arch: Architecture, layout: Layout, stage: int, unlearning: Unlearning | None = None
) -> dict[str, int]:
    """Bytes on one GPU of a pipeline stage, by part.

    A parameter takes 18 bytes in bf16, or `6 + 12 / DP` with the distributed optimizer
    (Megatron-Core user guide, "Distributed Optimizer"): 2 for the weight, 4 for its fp32 gradient
    buffer, 4 for the fp32 master and 8 for Adam's moments. In fp32 the weight is its own master.

    Under 1F1B, stage i of p keeps the activations of `min(p - i, microbatches)` microbatches
    (arXiv 2104.04473, section 2.2.1). The reference's final hidden states wait on the last stage,
    one vector for each replay token of this data-parallel rank.
    """
    element = 2 if layout.bf16 else 4
    last = stage == layout.pp - 1
    count = arch.stage_parameters(stage, tp=layout.tp, pp=layout.pp)
    shards = layout.data_parallel if layout.distributed_optimizer else 1
    tokens = layout.micro_batch * layout.sequence
    in_flight = min(layout.pp - stage, layout.microbatches)
    sequence_split = layout.tp if layout.sequence_parallel else 1
    activations = activation_bytes_per_token(arch, layout) * tokens * in_flight
    activations *= arch.layers // layout.pp
    if layout.recompute == "full":  # the layer that is being recomputed
        activations += tokens * activation_bytes_per_token(arch, replace(layout, recompute="none"))
    if last:  # input and output of the final norm
        activations += 2 * element * arch.hidden * tokens / sequence_split
    parts = {
        "weights": element * count,
        "gradients (fp32)": 4 * count,
        "master and moments (fp32)": (12 if layout.bf16 else 8) * count // shards,
        "activations": round(activations),
    }
    if unlearning is not None and unlearning.reference:
        output = arch.padded_vocab(layout.tp) // layout.tp * arch.hidden if last else 0
        parts["reference weights"] = element * (output if unlearning.reference_offload else count)
        replayed = (layout.global_batch - unlearning.forget_batch) // layout.data_parallel
        kept = replayed * layout.sequence * arch.hidden * element // sequence_split
        parts["reference hidden states"] = kept if last else 0
    return parts


def worst_stage(
    arch: Architecture, layout: Layout, unlearning: Unlearning | None = None
) -> tuple[int, dict[str, int]]:
    """The pipeline stage that needs the most memory, and its parts in bytes.

    Raises:
        ConfigError: the layers do not divide into stages, or the heads into TP ranks.
    """
    if arch.layers % layout.pp:
        raise ConfigError(
            f"--num-layers: expected a multiple of PP {layout.pp}, found {arch.layers}"
        )
    if arch.heads % layout.tp or arch.ffn % layout.tp:
        raise ConfigError(
            f"--num-attention-heads, --ffn-hidden-size: expected multiples of TP {layout.tp}, "
            f"found {arch.heads} and {arch.ffn}"
        )
    stages = [stage_memory(arch, layout, i, unlearning) for i in range(layout.pp)]
    worst = max(range(layout.pp), key=lambda i: sum(stages[i].values()))
    return worst, stages[worst]


def step_flops(arch: Architecture, layout: Layout, unlearning: Unlearning | None = None) -> float:
    """FLOPs of a step; the reference adds a forward pass, a third, for each replay token."""
    passes = float(layout.global_batch)
    if unlearning is not None and unlearning.reference:
        passes += (layout.global_batch - unlearning.forget_batch) / 3
    return passes * layout.sequence * arch.flops_per_token(layout.sequence, tp=layout.tp)


def checkpoint_bytes(arch: Architecture, *, tp: int = 1, bf16: bool) -> int:
    """Bytes of a checkpoint with optimizer: weights, moments, and with bf16 the fp32 master.

    A model of 3,344,064 fp32 parameters was saved in 40,407,775 bytes; this gives 40,128,768.
    """
    return arch.parameters(tp) * (14 if bf16 else 12)


@dataclass(frozen=True)
class DatasetUse:
    """How often a run reads a dataset: `epochs = used / tokens`, both of the training split."""

    prefix: str
    share: float
    tokens: float
    used: float

    @property
    def epochs(self) -> float:
        """Times that the training split is read."""
        return self.used / self.tokens


def dataset_uses(blend: Sequence[str], *, tokens: float, split: str) -> list[DatasetUse]:
    """Spread a run's tokens over a blend in Megatron's syntax, `[weight] prefix ...`.

    Args:
        blend: one prefix, weights and prefixes in turn, or prefixes alone (shares by size).
        tokens: tokens that the run reads of the blend.
        split: Megatron's `--split`; it divides documents, so tokens only on average.

    Raises:
        ConfigError: a split that leaves nothing to train on.
        DataError: a dataset is missing or broken.
    """
    weights, prefixes = _parse_blend(blend)
    parts = [float(part) for part in split.split(",")]
    if not sum(parts) or not parts[0]:
        raise ConfigError(f"--split: expected a share for training, found {split}")
    sizes = [read_index_summary(prefix).tokens * parts[0] / sum(parts) for prefix in prefixes]
    weights = weights or sizes
    shares = [weight / sum(weights) for weight in weights]
    return [
        DatasetUse(prefix, share, size, share * tokens)
        for prefix, share, size in zip(prefixes, shares, sizes, strict=True)
    ]


def _parse_blend(blend: Sequence[str]) -> tuple[list[float], list[str]]:
    """Weights, if there are any, and prefixes; the same rule as Megatron's."""
    if len(blend) % 2 == 0:
        try:
            return [float(weight) for weight in blend[::2]], list(blend[1::2])
        except ValueError:
            pass
    return [], list(blend)
