"""The model's sizes: parameters, tensor by tensor, and FLOPs.

For the architecture of arXiv 2406.12397 (table 1): a Llama-like decoder with RoPE, RMSNorm, SwiGLU
and no biases; and for those that add biases of queries, keys and values (Qwen2) or norms of queries and
keys (Qwen3). Some or all layers may be mixtures of experts (`mixture`).

Symbols: h hidden size, f FFN size, d head size, q = heads x d, k = query groups x d, L layers, V padded
vocabulary, s sequence length.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

from megatron_ext.planning.mixture import Mixture
from megatron_ext.planning.split import Split, Tensor


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
        mixture: which layers are mixtures of experts, and their sizes; None: none of them.
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
    mixture: Mixture | None = None

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

    def kind(self, layer: int) -> Mixture | None:
        """The mixture of experts that a layer is, None where it is dense."""
        mixture = self.mixture
        return mixture if mixture is not None and mixture.layers[layer] else None

    def kinds(self, stage: int, chunk: int, split: Split) -> list[Mixture | None]:
        """Of each layer of a model chunk, which mixture it is."""
        return [self.kind(layer) for layer in split.chunk_layers(self.layers, stage, chunk)]

    def matrices(self, kind: Mixture | None) -> int:
        """Parameters of a layer's matrices that a token meets: `h (q + 2k) + q h + 3 h f`.

        For a mixture f is the width of the token's experts. Its router is left out, as in the FLOPs that
        Megatron reports.
        """
        width = self.ffn if kind is None else kind.active
        return self.hidden * (2 * self.query + 2 * self.key + 3 * width)

    def parameters(self, tp: int = 1) -> int:
        """Exact number of parameters with the vocabulary padded for `tp`."""
        layers = sum(
            tensor.elements
            for layer in range(self.layers)
            for tensor in self._layer_tensors(self.kind(layer), Split())
        )
        return layers + self.hidden + self._embeddings(tp)

    def active_parameters(self, tp: int = 1) -> int:
        """Parameters that a token meets: all but those of the experts that it is not routed to."""
        mixture = self.mixture
        if mixture is None:
            return self.parameters(tp)
        idle = 3 * self.hidden * mixture.ffn * (mixture.experts - mixture.topk)
        return self.parameters(tp) - sum(mixture.layers) * idle

    def _embeddings(self, tp: int) -> int:
        return self.padded_vocab(tp) * self.hidden * (1 if self.tied else 2)

    def chunk_tensors(self, stage: int, chunk: int, split: Split) -> list[Tensor]:
        """Parameters on one GPU of a model chunk, in the order of Megatron's `named_parameters`.

        Norms are on every TP rank. A tied embedding has a copy on the last stage.

        Args:
            stage: pipeline rank.
            chunk: which of the chunks of that rank.
            split: how the model is divided.
        """
        first = stage == 0 and chunk == 0
        last = stage == split.pp - 1 and chunk == split.vpp - 1
        table = self.padded_vocab(split.tp) // split.tp * self.hidden
        apart = self.tied and split.pp > 1
        tensors = [Tensor(table, apart)] if first else []
        for kind in self.kinds(stage, chunk, split):
            tensors += self._layer_tensors(kind, split)
        if last:
            tensors.append(Tensor(self.hidden))
            if not self.tied or apart:
                tensors.append(Tensor(table, apart))
        return tensors

    def _layer_tensors(self, kind: Mixture | None, split: Split) -> list[Tensor]:
        """Norm, attention output, query-key-value, their norms, norm, gate and up, down; or experts."""
        h, f, tp = self.hidden, self.ffn // split.tp, split.tp
        output, qkv = self.query // tp * h, (self.query + 2 * self.key) // tp
        first = (output, h) if self.fused_norms else (h, output)
        bias = (qkv,) if self.qkv_bias else ()
        norms = (self.head_size, self.head_size) if self.qk_norm else ()
        dense = (2 * h * f, f * h) if kind is None else ()
        found = [Tensor(size) for size in (*first, h * qkv, *bias, *norms, h, *dense)]
        return found if kind is None else [*found, *kind.tensors(h, split)]

    @functools.lru_cache(maxsize=1024)  # noqa: B019 - keyed by sizes alone
    def stage_parameters(self, stage: int, split: Split) -> int:
        """Parameters on one GPU of a pipeline stage, all of its chunks."""
        return sum(
            tensor.elements
            for chunk in range(split.vpp)
            for tensor in self.chunk_tensors(stage, chunk, split)
        )

    def layer_flops(self, sequence: int, kind: Mixture | None = None) -> float:
        """FLOPs of a layer's forward pass for one token: 2 a parameter, and causal attention.

        Scores and context are `2 s q` each over `s` keys, half of which the mask leaves out.
        """
        return 2.0 * (self.matrices(kind) + sequence * self.query)

    def head_flops(self, *, tp: int = 1) -> float:
        """FLOPs of the output layer's forward pass for one token."""
        return 2.0 * self.padded_vocab(tp) * self.hidden

    def flops_per_token(self, sequence: int, *, tp: int = 1) -> float:
        """FLOPs of forward and backward for one token; backward is twice the forward.

        So 6 a parameter of a matrix product (arXiv 2001.08361, section 2.1; the embedding is a
        lookup) and `6 s q` a layer for attention.
        """
        kinds = (self.kind(layer) for layer in range(self.layers))
        layers = sum(self.layer_flops(sequence, kind) for kind in kinds)
        return 3.0 * (layers + self.head_flops(tp=tp))
