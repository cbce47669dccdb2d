"""Attention within documents in Transformer Engine's layers.

Transformer Engine attends to documents of many lengths in its own format, `thd`: the tokens of all of a
microbatch's samples one after the other. Megatron uses it where the whole model runs in this format. Here
samples keep their shape `[s, b]`, and only the core attention sees them so; its projections, fp8 included,
are as they were.

Under context parallelism the format wants each document split over the ranks by itself, while Megatron's
datasets give samples that are split as a whole. The torch-native core attention takes its place there,
which gathers keys and values.

Shapes: s sequence, b batch, h query heads and g key heads on this rank, d head size.
"""

from __future__ import annotations

from copy import deepcopy
from functools import cache
from typing import TYPE_CHECKING, Any

from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer import ModuleSpec, TransformerConfig
from megatron.core.transformer.enums import AttnMaskType
from torch import Tensor

from megatron_ext.exceptions import ConfigError
from megatron_ext.model.attention import SdpaCoreAttention
from megatron_ext.model.documents import Documents

if TYPE_CHECKING:
    from torch.nn import Module as _CoreAttention
else:
    _CoreAttention = object


class WithinDocuments(_CoreAttention):
    """What comes before Megatron's `TEDotProductAttention` among the parents of `_te_core_attention`."""

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
        **options: Any,
    ) -> Tensor:
        """Attend causally, each token to its own document.

        Args:
            query: `[s, b, h, d]`, any strides.
            key: `[s, b, g, d]`.
            value: `[s, b, g, d]`.
            attention_mask: Not read.
            attn_mask_type: `causal`.
            attention_bias: Must be None.
            packed_seq_params: `Documents` of the samples. Otherwise everything is as without this class:
                generation and analyses read samples of one document.
            options: For Megatron's module.

        Returns:
            Context `[s, b, h * d]`.
        """
        attend = super().forward
        if not isinstance(packed_seq_params, Documents):
            return attend(
                query,
                key,
                value,
                attention_mask,
                attn_mask_type,
                attention_bias=attention_bias,
                packed_seq_params=packed_seq_params,
                **options,
            )
        assert attn_mask_type is AttnMaskType.causal, f"not causal: {attn_mask_type}"
        assert attention_bias is None, "attention bias is not supported"
        length, samples = query.shape[:2]
        packed = packed_seq_params.packed(query.device)
        tokens = (_one_after_the_other(part) for part in (query, key, value))
        context = attend(*tokens, None, attn_mask_type, packed_seq_params=packed, **options)
        # Of more than one sample a copy, as the projection that follows wants it.
        return context.reshape(samples, length, -1).transpose(0, 1).contiguous()


def _one_after_the_other(samples: Tensor) -> Tensor:
    """`[b * s, h, d]` of `[s, b, h, d]`; a view where there is one sample."""
    return samples.squeeze(1) if samples.shape[1] == 1 else samples.transpose(0, 1).flatten(0, 1)


@cache
def _te_core_attention() -> type:
    from megatron.core.extensions.transformer_engine import TEDotProductAttention

    return type("TEAttentionWithinDocuments", (WithinDocuments, TEDotProductAttention), {})


def _instead_of(core_attention: Any, config: TransformerConfig) -> type:
    """What computes the same within documents."""
    from megatron.core.extensions.transformer_engine import TEDotProductAttention

    if core_attention is not TEDotProductAttention:
        found = getattr(core_attention, "__name__", core_attention)
        raise ConfigError(
            "--dataloader-inter-document-masking: expected layers with Transformer Engine's attention, "
            f"found {found}"
        )
    return _te_core_attention() if config.context_parallel_size == 1 else SdpaCoreAttention


def within_documents(spec: Any, config: TransformerConfig) -> Any:
    """Layers that attend within documents.

    Args:
        spec: Megatron's spec of a layer with Transformer Engine, or of a block of such layers.
        config: Model config.

    Raises:
        ConfigError: A layer has another attention.
    """
    spec = deepcopy(spec)
    layers = getattr(spec, "layer_specs", None)
    layers = [spec] if layers is None else layers  # of none, where a stage has no layer
    found = [layer.submodules.self_attention.submodules for layer in layers]
    for own in {id(one): one for one in found}.values():
        own.core_attention = _instead_of(own.core_attention, config)
    return spec


def te_spec_within_documents(model_config: Any, vp_stage: int | None = None) -> ModuleSpec:
    """Megatron's own choice of layers, within documents, as `GPTModelConfig.transformer_layer_spec`.

    Args:
        model_config: `megatron.training.models.gpt.GPTModelConfig`.
        vp_stage: Virtual pipeline stage of the model chunk.

    Raises:
        ConfigError: See `within_documents`.
    """
    from megatron.training.models.gpt import default_layer_spec

    spec: ModuleSpec = within_documents(
        default_layer_spec(model_config, vp_stage), model_config.transformer
    )
    return spec
