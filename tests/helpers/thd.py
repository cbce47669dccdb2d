"""Transformer Engine's attention in its format `thd`, by what its documentation says, for a CPU."""

from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.enums import AttnMaskType
from torch import Tensor
from torch.nn import functional

ACROSS = "not packed"  # what `seen` gets of a call that is not of documents


class ThdAttention(torch.nn.Module):
    """In place of Megatron's `TEDotProductAttention`; `seen` holds the documents' lengths of each call."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__()
        self.seen: list[Any] = []

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:
        """Context `[t, h * d]` of `[t, h, d]`, or `[s, b, h * d]` of `[s, b, h, d]`."""
        assert attn_mask_type is AttnMaskType.causal
        assert attention_bias is None
        if packed_seq_params is None:
            self.seen.append(ACROSS)
            return _causal(query, key, value).flatten(2)
        packed = packed_seq_params
        assert packed.qkv_format == "thd"
        assert {t.dim() for t in (query, key, value)} == {3}
        ends = packed.cu_seqlens_q
        assert ends is packed.cu_seqlens_kv
        assert ends.dtype == torch.int32
        assert (int(ends[0]), int(ends[-1])) == (0, len(query))
        lengths = ends.diff()
        assert lengths.max() == packed.max_seqlen_q == packed.max_seqlen_kv
        self.seen.append(lengths.tolist())
        parts = zip(*(t[:, None].split(lengths.tolist()) for t in (query, key, value)), strict=True)
        return torch.cat([_causal(*part) for part in parts]).flatten(1)


def _causal(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    parts = (t.permute(1, 2, 0, 3) for t in (query, key, value))
    context = functional.scaled_dot_product_attention(*parts, is_causal=True, enable_gqa=True)
    return context.permute(2, 0, 1, 3)
