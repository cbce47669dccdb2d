"""Normalisation layers in plain torch that also work under sequence parallelism.

Megatron's own torch fallback refuses sequence parallelism because `torch.nn.RMSNorm` does not mark
its parameters: every tensor-parallel rank then sees only its slice of the sequence and keeps a
partial gradient. The layers here set `sequence_parallel` on their parameters, which is the mark by
which `finalize_model_grads` finds and all-reduces them.

Parameter names are `weight` and `bias`, as everywhere in Megatron, so checkpoints need no renaming.
"""

from typing import Any

import torch
from megatron.core.transformer import TransformerConfig
from torch import Tensor, nn
from torch.nn import functional

from megatron_ext.exceptions import ConfigError


class TorchNorm(nn.Module):
    """RMSNorm or LayerNorm over the last dimension, as the model config asks.

    Statistics are fp32 whatever the input is (torch's kernels accumulate there), and the output has
    the parameters' dtype: with `fp32_residual_connection` the input is fp32 and the matrix products
    that follow still run in the parameters' precision. A zero-centred scale is applied in fp32, as
    Transformer Engine does; what is kept for the backward pass is then fp32 as well.

    Args:
        config: Model config; read are `normalization`, `layernorm_zero_centered_gamma`,
            `sequence_parallel` and `params_dtype`.
        hidden_size: Size of the last dimension.
        eps: Added to the variance (or mean square) before the root.

    Raises:
        ConfigError: `normalization` is neither "RMSNorm" nor "LayerNorm".
    """

    def __init__(
        self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_unused: Any
    ) -> None:
        super().__init__()
        if config.normalization not in ("RMSNorm", "LayerNorm"):
            raise ConfigError(
                "the torch-native layers know --normalization RMSNorm and LayerNorm; "
                f"found {config.normalization!r}"
            )
        self.shape = (hidden_size,)
        self.eps = eps
        self.zero_centered = config.layernorm_zero_centered_gamma
        self.weight = nn.Parameter(torch.empty(hidden_size))
        self.bias: nn.Parameter | None = None
        if config.normalization == "LayerNorm":
            self.bias = nn.Parameter(torch.empty(hidden_size))
        for parameter in self.parameters():
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set the scale to one (stored as zero when zero-centred) and the shift to zero."""
        nn.init.constant_(self.weight, 0.0 if self.zero_centered else 1.0)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise `x` `[..., hidden_size]`; the result has the same shape."""
        weight: Tensor = self.weight
        bias: Tensor | None = self.bias
        dtype = weight.dtype
        if self.zero_centered:  # 1 + weight in bf16 would have 7 bits behind the point
            x = x.float()
        if x.dtype != dtype:
            weight = weight.to(x.dtype)
            bias = None if bias is None else bias.to(x.dtype)
        if self.zero_centered:
            weight = weight + 1
        if bias is None:
            return functional.rms_norm(x, self.shape, weight, self.eps).to(dtype)
        return functional.layer_norm(x, self.shape, weight, bias, self.eps).to(dtype)

    def extra_repr(self) -> str:
        """Name the kind and size in the module's printout."""
        kind = "RMSNorm" if self.bias is None else "LayerNorm"
        return f"{kind}, {self.shape[0]}, eps={self.eps}"
