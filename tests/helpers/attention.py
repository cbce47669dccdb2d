"""The torch-native attention alone: no process groups, no model around it."""

from types import SimpleNamespace

from megatron.core.transformer.enums import AttnBackend, AttnMaskType

from megatron_ext.model.attention import SdpaCoreAttention


def core_attention(backend: AttnBackend = AttnBackend.auto) -> SdpaCoreAttention:
    """Without dropout, with the usual scale."""
    config = SimpleNamespace(
        attention_dropout=0.0, attention_backend=backend, context_parallel_size=1
    )
    causal = AttnMaskType.causal
    return SdpaCoreAttention(config, 1, attn_mask_type=causal, attention_type="self")
