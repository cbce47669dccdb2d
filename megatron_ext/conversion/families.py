"""The architectures of `transformers` that are a Llama but for biases, norms, rotation and experts."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from transformers import (
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
    SmolLM3Config,
)

Bias = Literal["none", "qkv", "all"]


@dataclass(frozen=True)
class Mixture:
    """What an architecture calls the experts of a layer.

    Attributes:
        room: of the router and the experts in the names of tensors.
        projections: gate, linear half and output of an expert.
        width: field of the config: the hidden size of an expert.
        renormalises: whether the weights of a token's experts always sum to 1; else the config says it.
    """

    room: str
    projections: tuple[str, str, str]
    width: str
    renormalises: bool


@dataclass(frozen=True)
class Family:
    """One architecture.

    Attributes:
        name: `model_type` of its config.
        config: class of its config.
        architecture: class of its language model.
        biases: which linear layers can have a bias: none, queries, keys and values, or all.
        qk_norm: whether each head's query and key are normed.
        output_bias: whether a bias of queries, keys and values brings one of the attention's output along.
        unrotated: whether there may be layers whose queries and keys are not rotated.
        mixture: of its layers, if they are mixtures of experts.
    """

    name: str
    config: type[Any]
    architecture: str
    biases: tuple[Bias, ...]
    qk_norm: bool = False
    output_bias: bool = True
    unrotated: bool = False
    mixture: Mixture | None = None

    def holds(
        self, *, bias: Bias, qk_norm: bool, unrotated: bool, renormalised: bool | None
    ) -> bool:
        """Whether a model with these biases and norms is one of the family.

        Args:
            bias: which linear layers have one.
            qk_norm: whether each head's query and key are normed.
            unrotated: whether there are layers whose queries and keys are not rotated.
            renormalised: of a mixture, whether the weights of a token's experts sum to 1; `None` if dense.
        """
        if (renormalised is None) != (self.mixture is None):
            return False
        if self.mixture is not None and self.mixture.renormalises and not renormalised:
            return False
        if unrotated and not self.unrotated:
            return False
        return bias in self.biases and qk_norm == self.qk_norm

    def bias(self, config: PreTrainedConfig) -> Bias:
        """Which layers of a model have a bias; a config that has no say in it is not asked."""
        if len(self.biases) == 1:
            return self.biases[0]
        if "all" in self.biases and config.mlp_bias:
            return "all"
        return "qkv" if config.attention_bias else "none"

    def known(self, fields: Mapping[str, Any]) -> dict[str, Any]:
        """Those of some fields that the family's config has."""
        names = {field.name for field in dataclasses.fields(self.config)}
        return {name: value for name, value in fields.items() if name in names}


_EXPERT = ("gate_proj", "up_proj", "down_proj")
_QWEN_MIXTURE = Mixture("mlp.", _EXPERT, "moe_intermediate_size", renormalises=False)
_MIXTRAL = Mixture("block_sparse_moe.", ("w1", "w3", "w2"), "intermediate_size", renormalises=True)
# By `model_type`. A model that was not imported becomes the first that holds it.
FAMILIES = {
    family.name: family
    for family in (
        Family("llama", LlamaConfig, "LlamaForCausalLM", ("none", "qkv", "all")),
        Family("qwen3", Qwen3Config, "Qwen3ForCausalLM", ("none", "qkv"), qk_norm=True),
        Family("qwen2", Qwen2Config, "Qwen2ForCausalLM", ("qkv",), output_bias=False),
        Family("mistral", MistralConfig, "MistralForCausalLM", ("none",)),
        Family(
            "smollm3",
            SmolLM3Config,
            "SmolLM3ForCausalLM",
            ("none", "qkv", "all"),
            unrotated=True,
        ),
        Family(
            "qwen3_moe",
            Qwen3MoeConfig,
            "Qwen3MoeForCausalLM",
            ("none", "qkv"),
            qk_norm=True,
            mixture=_QWEN_MIXTURE,
        ),
        Family("mixtral", MixtralConfig, "MixtralForCausalLM", ("none",), mixture=_MIXTRAL),
    )
}
