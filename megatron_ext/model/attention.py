"""Causal self-attention through torch's `scaled_dot_product_attention`.

Flash or cuDNN kernels on a GPU, torch's flash kernel on a CPU: the `[s, s]` matrix of scores that
Megatron's local layers hold is never formed. At 32 heads and sequence 4096 it is 1 GiB in bf16, for
each layer and sample.

Shapes: s sequence, b batch, h query heads and g key heads on this rank, d head size.
"""

from contextlib import AbstractContextManager, nullcontext
from functools import cache, partial
from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.enums import AttnBackend, AttnMaskType
from megatron.core.transformer.module import MegatronModule
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.nn import functional
from torch.nn.attention import SDPBackend

from megatron_ext.model.context_parallel import attend_over_ranks
from megatron_ext.model.documents import FLASH_HEAD, Documents, attend_within, has_flash
from megatron_ext.model.kernel_choice import only
from megatron_ext.model.rope import cos_sin, rotate, split_rotate

# cuDNN up to this version may read beyond sequences whose length is no multiple of 128; 9.15.1 mended it.
# torch's own order does not prefer such a one either.
_UNSOUND_CUDNN = 91500


@cache
def _gpu_backends(device: torch.device, chosen: AttnBackend) -> tuple[SDPBackend, ...]:
    """What torch may choose from, in order of preference.

    MATH, which forms `[s, s]`, only where `--attention-backend unfused` asks for it. cuDNN's is the fastest
    one on Hopper; elsewhere it was not measured, and `fused` asks for it.
    """
    if chosen is AttnBackend.unfused:
        return (SDPBackend.MATH,)
    others = SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION
    hopper = torch.cuda.get_device_capability(device)[0] == 9
    wanted = chosen is AttnBackend.fused or (chosen is AttnBackend.auto and hopper)
    if wanted and (torch.backends.cudnn.version() or 0) > _UNSOUND_CUDNN:
        return SDPBackend.CUDNN_ATTENTION, *others
    return others


def _last_queries(query: Tensor, key: Tensor) -> Tensor | None:
    """Mask of queries that are the last positions of the keys, where torch needs one."""
    queries, keys = len(query), len(key)
    if queries in (1, keys):
        return None
    if query.is_cuda:
        # Brings torch's compiler, which a start on a CPU does without (0.5 s).
        from torch.nn.attention.bias import causal_lower_right

        return causal_lower_right(queries, keys)  # flash knows it; [n, m] is never formed
    return torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)


class SdpaCoreAttention(MegatronModule):
    """Softmax attention between projected queries, keys and values; no parameters.

    The mask is causal by construction: the mask tensor that Megatron hands over is not read, so it
    need not be built. `apply_query_key_layer_scaling` is an identity here: it only divides the
    scores before and multiplies them after a half-precision product. With dropout on a CPU torch
    falls back to the whole matrix of scores.

    Args:
        config: Model config; its `attention_backend` chooses among a GPU's kernels.
        layer_number: Unused, part of Megatron's interface.
        attn_mask_type: Must be `causal`.
        attention_type: Unused, part of Megatron's interface.
        attention_dropout: Probability; the config's where None.
        softmax_scale: Factor on the scores; `1 / sqrt(d)` where None.
        cp_comm_type: Unused: context-parallel ranks gather keys and values.
        pg_collection: Its `cp` is read, the context-parallel ranks.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: ProcessGroupCollection | None = None,
    ) -> None:
        super().__init__(config=config)
        assert attn_mask_type == AttnMaskType.causal, (
            f"expected a causal mask, got {attn_mask_type}"
        )
        self.dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        self.softmax_scale = softmax_scale
        self.cp_group: ProcessGroup | None = None
        if config.context_parallel_size > 1:
            if pg_collection is None:
                pg_collection = ProcessGroupCollection.use_mpu_process_groups(required_pgs=["cp"])
            self.cp_group = pg_collection.cp

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: Documents | None = None,
    ) -> Tensor:
        """Attend causally, and within documents.

        Args:
            query: `[s, b, h, d]`, any strides; or `[1, b, h, d]`, the last position of the keys. Under
                context parallelism all three are this rank's part of the sequence.
            key: `[s, b, g, d]`.
            value: `[s, b, g, d]`.
            attention_mask: Not read.
            attn_mask_type: `causal` or None.
            attention_bias: Must be None.
            packed_seq_params: `Documents` of the samples; None where each of them is one.

        Returns:
            Context `[s, b, h * d]`, of as many positions as `query`.
        """
        assert attn_mask_type in (None, AttnMaskType.causal), f"not causal: {attn_mask_type}"
        assert attention_bias is None, "attention bias is not supported"
        assert packed_seq_params is None or isinstance(packed_seq_params, Documents)
        assert query.shape[0] in (1, key.shape[0]), "expected one query, or as many as keys"
        dropout = self.dropout if self.training else 0.0
        # Under sequence parallelism the whole block already runs in the forked random state.
        forked = dropout > 0 and not self.config.sequence_parallel
        kernels: AbstractContextManager[None] = nullcontext()
        if query.is_cuda:
            chosen = self.config.attention_backend
            if packed_seq_params is not None and chosen is not AttnBackend.unfused:
                chosen = AttnBackend.flash  # cuDNN plans each length anew
            kernels = only(_gpu_backends(query.device, chosen))
        attend = partial(self._attend, dropout=dropout)
        if packed_seq_params is not None:
            attend = partial(
                attend_within,
                documents=packed_seq_params,
                attend=attend,
                flash=has_flash(query, dropout=dropout, backend=self.config.attention_backend),
                scale=self.softmax_scale,
            )
        with get_cuda_rng_tracker().fork() if forked else nullcontext(), kernels:
            if self.cp_group is None:
                context = attend(query, key, value)
            else:
                context = attend_over_ranks(query, key, value, attend, group=self.cp_group)
        return context.flatten(2)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, *, dropout: float) -> Tensor:
        """Causal context `[n, b, h, d]` of queries of that shape, the last n positions of the keys."""
        grouped = query.shape[2] != key.shape[2]
        # torch's one kernel for these without [s, s] refuses grouped heads, and none is left then.
        alone = query.dtype == torch.float32 or query.shape[3] > FLASH_HEAD
        if grouped and query.is_cuda and alone:
            repeats = query.shape[2] // key.shape[2]
            key, value = (t.repeat_interleave(repeats, dim=2) for t in (key, value))
            grouped = False
        context = functional.scaled_dot_product_attention(
            query.permute(1, 2, 0, 3),
            key.permute(1, 2, 0, 3),
            value.permute(1, 2, 0, 3),
            attn_mask=_last_queries(query, key),
            dropout_p=dropout,
            is_causal=len(query) == len(key) > 1,
            scale=self.softmax_scale,
            enable_gqa=grouped,
        )
        return context.permute(2, 0, 1, 3)


class TorchSelfAttention(SelfAttention):
    """Megatron's self-attention with a forward that moves less memory.

    Same parameters and checkpoint as the parent. Only the way from the projection to the core
    attention differs (see `megatron_ext.model.rope`), and that the key-value cache of generation
    holds rotated keys: the parent rotates all of them again for every token.
    """

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None,
        key_value_states: Tensor | None = None,
        inference_context: Any = None,
        rotary_pos_emb: Tensor | tuple[Tensor, Tensor] | None = None,
        rotary_pos_cos: Tensor | None = None,
        rotary_pos_sin: Tensor | None = None,
        rotary_pos_cos_sin: Tensor | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: Any = None,
        sequence_len_offset: int | None = None,
        *,
        inference_params: Any = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend within `hidden_states` `[s, b, hidden]`, and to what a key-value cache holds.

        Without a cache they are the whole sequence. With one (`inference_context`, Megatron's
        `StaticInferenceContext`) they are the first positions of all, or the one position that
        follows those in the cache, and `rotary_pos_emb` `[s, 1, 1, rot]` begins at position 0.

        Returns:
            The projected context `[s, b, hidden]` and the bias, if any, that is yet to be added.
        """
        assert inference_params is None, "expected inference_context, Megatron's newer name"
        angles = self._angles(rotary_pos_emb)
        if inference_context is not None and angles is not None:
            start = inference_context.sequence_len_offset
            cos, sin = (part[start : start + len(hidden_states)] for part in angles)
            angles = cos, sin
        query, key, value = self._projected(hidden_states, angles)
        if inference_context is not None:
            key, value = self._cached(key, value, inference_context)
        attend = (
            self._checkpointed_attention_forward
            if self.checkpoint_core_attention and self.training
            else self.core_attention
        )
        context = attend(
            query,
            key,
            value,
            attention_mask,
            attention_bias=attention_bias,
            packed_seq_params=packed_seq_params,
        )
        return self.linear_proj(context)

    def _cached(self, key: Tensor, value: Tensor, inference_context: Any) -> tuple[Tensor, Tensor]:
        """Keep keys and values `[s, b, g, d]`; return those of all positions up to the last of them."""
        context = inference_context
        assert context.is_static_batching(), "only Megatron's static key-value cache is supported"
        cache = context.key_value_memory_dict
        if self.layer_number not in cache:
            shape = (context.max_sequence_length, context.max_batch_size, *key.shape[2:])
            cache[self.layer_number] = key.new_empty(shape), value.new_empty(shape)
        start, end = context.sequence_len_offset, context.sequence_len_offset + len(key)
        for kept, new in zip(cache[self.layer_number], (key, value), strict=True):
            kept[start:end] = new
        keys, values = cache[self.layer_number]
        return keys[:end], values[:end]

    def _angles(
        self, rotary_pos_emb: Tensor | tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, Tensor] | None:
        """Cosines and sines of this layer's rotation, or None where it has none."""
        skipped = self.config.no_rope_freq and self.config.no_rope_freq[self.layer_number - 1]
        if rotary_pos_emb is None or skipped:
            return None
        freqs = rotary_pos_emb[0] if isinstance(rotary_pos_emb, tuple) else rotary_pos_emb
        return cos_sin(freqs, scale=self._yarn_concentration_factor)

    def _projected(
        self, hidden_states: Tensor, angles: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries `[s, b, h, d]`, keys and values `[s, b, g, d]`, normalised and rotated."""
        # With fewer groups than ranks the parent gathers the projection over the ranks first.
        if self.config.num_query_groups < self.world_size:
            query, key, value = self.get_query_key_value_tensors(hidden_states)
            if angles is not None:
                query, key = rotate(query, *angles), rotate(key, *angles)
            return query, key, value
        groups = self.num_query_groups_per_partition
        heads = self.num_attention_heads_per_partition // groups
        mixed, _ = self.linear_qkv(hidden_states)
        if self.q_layernorm is None and self.k_layernorm is None:
            return split_rotate(mixed, *(angles or (None, None)), groups=groups, heads=heads)
        if self.config.test_mode:
            self.run_realtime_tests()
        # The norms keep their inputs, which are views of the projection, so that nothing is there twice.
        parts = mixed.unflatten(-1, (groups, heads + 2, -1)).split((heads, 1, 1), dim=3)
        norms = self.q_layernorm, self.k_layernorm, None
        query, key, value = (
            (part if norm is None else norm(part)).flatten(2, 3)
            for part, norm in zip(parts, norms, strict=True)
        )
        if angles is not None:
            query, key = rotate(query, *angles), rotate(key, *angles)
        return query, key, value
