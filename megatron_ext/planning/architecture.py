"""The model's sizes: parameters, tensor by tensor, and FLOPs.

For the architecture of arXiv 2406.12397 (table 1): a Llama-like decoder with RoPE, RMSNorm, SwiGLU
and no biases; and for those that add biases of queries, keys and values (Qwen2) or norms of queries and
keys (Qwen3).

Symbols: h hidden size, f FFN size, d head size, q = heads x d, k = query groups x d, L layers, V padded
vocabulary, s sequence length.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple


class Tensor(NamedTuple):
    """A parameter on one GPU.

    Attributes:
        elements: elements of this GPU's shard.
        shared: whether it is one of the two copies of a tied embedding on different stages.
    """

    elements: int
    shared: bool = False


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
        padded: `--padded-vocab-size`, rows of the embedding whatever the layout; `None` pads for it.
        tied: whether the output layer is the embedding.
        qkv_bias: whether queries, keys and values have a bias.
        qk_norm: whether each head's query and key are normed.
        fused_norms: whether each norm is part of the matrix that follows, as in Transformer Engine's layers.
            That changes the order of a layer's parameters, and with it the padding of buckets.
    """

    layers: int
    hidden: int
    ffn: int
    heads: int
    query_groups: int
    head_size: int
    vocab_size: int
    vocab_multiple: int = 128
    padded: int | None = None
    tied: bool = False
    qkv_bias: bool = False
    qk_norm: bool = False
    fused_norms: bool = False

    @property
    def query(self) -> int:
        """q: width of all query heads."""
        return self.heads * self.head_size

    @property
    def key(self) -> int:
        """k: width of all key heads."""
        return self.query_groups * self.head_size

    def padded_vocab(self, tp: int = 1) -> int:
        """V: ids up to the next multiple of `vocab_multiple * tp`, as Megatron pads."""
        if self.padded is not None:
            return self.padded
        return math.ceil(self.vocab_size / (self.vocab_multiple * tp)) * self.vocab_multiple * tp

    @property
    def layer_matrices(self) -> int:
        """Parameters of a layer's matrices, which TP splits: `h (q + 2k) + q h + 3 h f`."""
        return self.hidden * (2 * self.query + 2 * self.key + 3 * self.ffn)

    def parameters(self, tp: int = 1) -> int:
        """Exact number of parameters with the vocabulary padded for `tp`."""
        embeddings = self.padded_vocab(tp) * self.hidden * (1 if self.tied else 2)
        return self.layers * sum(self._layer_tensors(1)) + self.hidden + embeddings

    def chunk_tensors(
        self, stage: int, chunk: int = 0, *, tp: int, pp: int, vpp: int = 1
    ) -> list[Tensor]:
        """Parameters on one GPU of a model chunk, in the order of Megatron's `named_parameters`.

        Norms are on every TP rank. A tied embedding has a copy on the last stage.

        Args:
            stage: pipeline rank.
            chunk: which of the `vpp` chunks of that rank.
            tp: tensor-parallel size.
            pp: pipeline-parallel size.
            vpp: chunks of a pipeline rank.
        """
        first = stage == 0 and chunk == 0
        last = stage == pp - 1 and chunk == vpp - 1
        table = self.padded_vocab(tp) // tp * self.hidden
        apart = self.tied and pp > 1
        tensors = [Tensor(table, apart)] if first else []
        for _ in range(self.layers // (pp * vpp)):
            tensors += map(Tensor, self._layer_tensors(tp))
        if last:
            tensors.append(Tensor(self.hidden))
            if not self.tied or apart:
                tensors.append(Tensor(table, apart))
        return tensors

    def _layer_tensors(self, tp: int) -> tuple[int, ...]:
        """Norm, attention output, query-key-value, their norms, norm, gate and up, down."""
        h, f = self.hidden, self.ffn // tp
        output, qkv = self.query // tp * h, (self.query + 2 * self.key) // tp
        first = (output, h) if self.fused_norms else (h, output)
        bias = (qkv,) if self.qkv_bias else ()
        norms = (self.head_size, self.head_size) if self.qk_norm else ()
        return *first, h * qkv, *bias, *norms, h, 2 * h * f, f * h

    def stage_parameters(self, stage: int, *, tp: int, pp: int, vpp: int = 1) -> int:
        """Parameters on one GPU of a pipeline stage, all of its chunks."""
        return sum(
            tensor.elements
            for chunk in range(vpp)
            for tensor in self.chunk_tensors(stage, chunk, tp=tp, pp=pp, vpp=vpp)
        )

    def layer_flops(self, sequence: int) -> float:
        """FLOPs of a layer's forward pass for one token: 2 a parameter, and causal attention.

        Scores and context are `2 s q` each over `s` keys, half of which the mask leaves out.
        """
        return 2.0 * (self.layer_matrices + sequence * self.query)

    def head_flops(self, *, tp: int = 1) -> float:
        """FLOPs of the output layer's forward pass for one token."""
        return 2.0 * self.padded_vocab(tp) * self.hidden

    def flops_per_token(self, sequence: int, *, tp: int = 1) -> float:
        """FLOPs of forward and backward for one token; backward is twice the forward.

        So 6 a parameter of a matrix product (arXiv 2001.08361, section 2.1; the embedding is a
        lookup) and `6 s q` a layer for attention.
        """
        return 3.0 * (self.layers * self.layer_flops(sequence) + self.head_flops(tp=tp))
