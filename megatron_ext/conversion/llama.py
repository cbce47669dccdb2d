"""Llama and its like, as a Hugging Face config and as Megatron's flags.

What either side can say and the other cannot is refused here, by the name of the field or flag.
"""

from __future__ import annotations

import math
from argparse import Namespace
from dataclasses import dataclass
from typing import Any

from megatron_ext.checkpoint.inspect import flag_of, unrotated_layers
from megatron_ext.conversion.experts import Experts
from megatron_ext.conversion.families import FAMILIES, Bias, Family
from megatron_ext.conversion.fields import refuse
from megatron_ext.conversion.rotation import (
    LLAMA3_ROPE,
    rope_freq_flag,
    rotary_base_of,
    scaling_factor_of,
    unrotated_of_config,
)

# Fields of a Hugging Face config that must be as here (or missing).
_CONFIG = {
    "hidden_act": "silu",
    "is_causal": True,
    "quantization_config": None,
}
# Megatron's arguments that must be as here for the model to be Llama's like (or missing).
_ARGUMENTS: dict[str, object] = {
    "position_embedding_type": "rope",
    "rotary_percent": 1.0,
    "rotary_interleaved": False,
    "rotary_seq_len_interpolation_factor": None,
    "normalization": "RMSNorm",
    "layernorm_zero_centered_gamma": False,
    "apply_residual_connection_post_layernorm": False,
    "swiglu": True,
    "glu_linear_offset": 0.0,
    "activation_func_clamp_value": None,
    "qk_l2_norm": False,
    "softmax_type": "vanilla",
    "window_size": None,
    "attention_output_gate": False,
    "multi_latent_attention": False,
    "mtp_num_layers": None,
    "use_mup": False,
}


@dataclass(frozen=True, kw_only=True)
class LlamaLike:
    """Sizes and switches of a model that both sides can hold.

    Attributes:
        family: the architecture of `transformers` that it is.
        vocab_size: rows of the embedding without padding.
        kv_channels: size of a head.
        rope_scaling_factor: of llama3's rotary scaling, `None` without it.
        bias: linear layers with a bias: none, only queries, keys and values, or all.
        tied: whether the output layer is the embedding.
        unrotated: of each layer, whether its queries and keys are not rotated; nothing if all are.
        experts: of the feed-forward parts, if they are mixtures; `ffn_hidden_size` is then of no tensor.
    """

    family: Family
    vocab_size: int
    hidden_size: int
    ffn_hidden_size: int
    num_layers: int
    num_attention_heads: int
    num_query_groups: int
    kv_channels: int
    max_position_embeddings: int
    norm_epsilon: float
    rotary_base: int
    rope_scaling_factor: float | None
    bias: Bias
    tied: bool
    unrotated: tuple[bool, ...] = ()
    experts: Experts | None = None

    @classmethod
    def from_config(cls, config: Any) -> LlamaLike:
        """Read a Hugging Face config.

        Args:
            config: of one of the `FAMILIES`, or of a model that will be refused.

        Raises:
            CheckpointError: the model is none that Megatron can run; names the field.
        """
        family = FAMILIES.get(config.model_type)
        if family is None:
            refuse("model_type", f"one of {', '.join(FAMILIES)}", config.model_type)
        fixed = {"architectures": [family.architecture], **_CONFIG}
        for field, expected in fixed.items():
            found = getattr(config, field, None)
            if found not in (expected, None):
                refuse(field, expected, found)
        _check_windows(config, family)
        if family.bias(config) == "all" and not config.attention_bias:
            refuse("mlp_bias", "False where attention_bias is False", True)
        if config.num_attention_heads % config.num_key_value_heads:
            divisor = f"a divisor of num_attention_heads {config.num_attention_heads}"
            refuse("num_key_value_heads", divisor, config.num_key_value_heads)
        return cls(
            family=family,
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            ffn_hidden_size=config.intermediate_size,
            num_layers=config.num_hidden_layers,
            num_attention_heads=config.num_attention_heads,
            num_query_groups=config.num_key_value_heads,
            kv_channels=getattr(config, "head_dim", None)
            or config.hidden_size // config.num_attention_heads,
            max_position_embeddings=config.max_position_embeddings,
            norm_epsilon=config.rms_norm_eps,
            rotary_base=rotary_base_of(config.rope_parameters),
            rope_scaling_factor=scaling_factor_of(config.rope_parameters),
            bias=family.bias(config),
            tied=config.tie_word_embeddings,
            unrotated=unrotated_of_config(config) if family.unrotated else (),
            experts=Experts.from_config(config, family),
        )

    @classmethod
    def from_arguments(
        cls, args: Namespace, *, vocab_size: int, family: Family | None = None
    ) -> LlamaLike:
        """Read the arguments that a Megatron checkpoint holds.

        Args:
            args: arguments of the run that wrote it.
            vocab_size: rows of the embedding without padding.
            family: the architecture to prefer, if it holds the model.

        Raises:
            CheckpointError: the model is in none of the families; names the argument.
        """
        for name, expected in _ARGUMENTS.items():
            found = getattr(args, name, expected)
            if found != expected:
                refuse(f"--{flag_of(name)}", expected, found)
        heads = args.num_attention_heads
        scaled = getattr(args, "use_rope_scaling", False)
        qkv_bias = getattr(args, "add_qkv_bias", False)
        bias: Bias = "all" if args.add_bias_linear else "qkv" if qkv_bias else "none"
        experts = Experts.from_arguments(args)
        qk_norm = getattr(args, "qk_layernorm", False)
        unrotated = unrotated_layers(args)
        family = _family(
            family, bias=bias, qk_norm=qk_norm, unrotated=bool(unrotated), experts=experts
        )
        ffn_hidden_size = args.ffn_hidden_size
        if experts is not None and family.mixture and family.mixture.width == "intermediate_size":
            ffn_hidden_size = experts.ffn_hidden_size  # of which the config has only one
        return cls(
            family=family,
            vocab_size=vocab_size,
            hidden_size=args.hidden_size,
            ffn_hidden_size=ffn_hidden_size,
            num_layers=args.num_layers,
            num_attention_heads=heads,
            num_query_groups=args.num_query_groups if args.group_query_attention else heads,
            kv_channels=args.kv_channels,
            max_position_embeddings=args.max_position_embeddings,
            norm_epsilon=args.layernorm_epsilon,
            rotary_base=args.rotary_base,
            rope_scaling_factor=args.rope_scaling_factor if scaled else None,
            bias=bias,
            tied=not args.untie_embeddings_and_output_weights,
            unrotated=unrotated,
            experts=experts,
        )

    def to_config(self) -> dict[str, Any]:
        """The fields of a Hugging Face config that say the same."""
        rope: dict[str, Any] = {"rope_theta": float(self.rotary_base), "rope_type": "default"}
        if self.rope_scaling_factor is not None:
            rope |= {"rope_type": "llama3", "factor": self.rope_scaling_factor, **LLAMA3_ROPE}
        sizes = {
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.ffn_hidden_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_attention_heads,
            "num_key_value_heads": self.num_query_groups,
            "head_dim": self.kv_channels,
            "max_position_embeddings": self.max_position_embeddings,
            "rms_norm_eps": self.norm_epsilon,
            "rope_parameters": rope,
            "tie_word_embeddings": self.tied,
            "hidden_act": "silu",
        }
        switches = {
            "attention_bias": self.bias != "none",
            "mlp_bias": self.bias == "all",
            "use_sliding_window": False,
            "sliding_window": None,
            "layer_types": ["full_attention"] * self.num_layers,
            "no_rope_layers": [int(not skip) for skip in self.unrotated] or [1] * self.num_layers,
        }
        if self.experts is not None:
            switches |= self.experts.to_config()
        return sizes | self.family.known(switches)

    def to_flags(self) -> list[list[str]]:
        """Megatron's flags of the architecture, each with its value."""
        flags: list[list[object]] = [
            ["--num-layers", self.num_layers],
            ["--hidden-size", self.hidden_size],
            ["--ffn-hidden-size", self.ffn_hidden_size],
            ["--num-attention-heads", self.num_attention_heads],
            ["--kv-channels", self.kv_channels],
            ["--max-position-embeddings", self.max_position_embeddings],
            ["--position-embedding-type", "rope"],
            ["--rotary-base", self.rotary_base],
            ["--normalization", "RMSNorm"],
            ["--norm-epsilon", self.norm_epsilon],
            ["--swiglu"],
        ]
        if self.num_query_groups != self.num_attention_heads:
            flags += [["--group-query-attention"], ["--num-query-groups", self.num_query_groups]]
        if self.rope_scaling_factor is not None:
            flags += [["--use-rope-scaling"], ["--rope-scaling-factor", self.rope_scaling_factor]]
        if self.unrotated:
            flags += [["--no-rope-freq", rope_freq_flag(self.unrotated)]]
        if self.bias != "all":
            flags += [["--disable-bias-linear"]]
        if self.bias != "none":
            flags += [["--add-qkv-bias"]]
        if self.family.qk_norm:
            flags += [["--qk-layernorm"]]
        if self.experts is not None:
            flags += self.experts.to_flags()
        if not self.tied:
            flags += [["--untie-embeddings-and-output-weights"]]
        return [[str(word) for word in flag] for flag in flags]


def _family(
    preferred: Family | None,
    *,
    bias: Bias,
    qk_norm: bool,
    unrotated: bool,
    experts: Experts | None,
) -> Family:
    candidates = [*([preferred] if preferred else []), *FAMILIES.values()]
    facts: dict[str, Any] = {
        "bias": bias,
        "qk_norm": qk_norm,
        "unrotated": unrotated,
        "renormalised": None if experts is None else experts.renormalised,
    }
    fitting = [family for family in candidates if family.holds(**facts)]
    if not fitting and unrotated:
        refuse("--no-rope-freq", "neither --qk-layernorm nor experts beside it", "one of them")
    if not fitting and experts is not None:
        refuse(
            "--num-experts",
            "beside it --disable-bias-linear, and --qk-layernorm (as Qwen3) or neither --add-qkv-bias nor "
            "--moe-router-pre-softmax (as Mixtral)",
            "no such model",
        )
    if not fitting:
        refuse("--qk-layernorm", "--disable-bias-linear beside it", "biases in all linear layers")
    return fitting[0]


def _check_windows(config: Any, family: Family) -> None:
    """Every layer sees all tokens before its own; a window as long as the longest text is none."""
    fields = family.known(vars(config))
    if "layer_types" in fields:
        others = {*fields["layer_types"]} - {"full_attention"}
        if others:
            refuse("layer_types", "full_attention in every layer", min(others))
    elif (fields.get("sliding_window") or math.inf) < config.max_position_embeddings:
        longest = f"null, or at least max_position_embeddings {config.max_position_embeddings}"
        refuse("sliding_window", longest, fields["sliding_window"])
