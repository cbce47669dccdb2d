"""Mixtures of experts in Llama's like: as fields of a Hugging Face config and as Megatron's flags."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import dataclass
from typing import Any

from megatron_ext.checkpoint.inspect import ROUTING_RULES, flag_of, routing_rule
from megatron_ext.conversion.families import Family
from megatron_ext.conversion.fields import refuse

# Fields of a config that must be as here (or missing): every layer is a mixture.
_CONFIG: dict[str, object] = {"decoder_sparse_step": 1, "mlp_only_layers": []}
# Megatron's arguments that must be as here (or missing).
_ARGUMENTS: dict[str, object] = {
    "moe_layer_freq": 1,
    "moe_shared_expert_intermediate_size": None,
    "moe_latent_size": None,
    "moe_router_score_function": "softmax",
    "moe_router_enable_expert_bias": False,
    "moe_router_num_groups": None,
    "moe_router_topk_limited_devices": None,
    "moe_router_topk_scaling_factor": None,
    "moe_apply_probs_on_input": False,
    "moe_expert_capacity_factor": None,
    "moe_mlp_glu_interleave_size": None,
    "moe_shared_expert_glu_interleave_size": None,
}


@dataclass(frozen=True, kw_only=True)
class Experts:
    """The feed-forward part of each layer.

    Attributes:
        number: experts of a layer.
        top_k: of them, those that a token goes to.
        ffn_hidden_size: of each.
        renormalised: whether the weights of a token's experts sum to 1, or to their share of all experts'.
    """

    number: int
    top_k: int
    ffn_hidden_size: int
    renormalised: bool

    @classmethod
    def from_config(cls, config: Any, family: Family) -> Experts | None:
        """Read a Hugging Face config; `None` of a dense family.

        Raises:
            CheckpointError: some layers are dense, or Megatron has no such routing; names the field.
        """
        if family.mixture is None:
            return None
        for field, expected in _CONFIG.items():
            found = getattr(config, field, None)
            if found not in (expected, None):
                refuse(field, expected, found)
        renormalised = family.mixture.renormalises or config.norm_topk_prob
        if renormalised and config.num_experts_per_tok == 1:
            # It would weight each token's only expert by 1, and the router would learn nothing.
            refuse("num_experts_per_tok", "at least 2 where their weights sum to 1", 1)
        return cls(
            number=config.num_experts,
            top_k=config.num_experts_per_tok,
            ffn_hidden_size=getattr(config, family.mixture.width),
            renormalised=renormalised,
        )

    @classmethod
    def from_arguments(cls, args: Namespace) -> Experts | None:
        """Read the arguments that a Megatron checkpoint holds; `None` of a dense model.

        Raises:
            CheckpointError: no family has such a mixture; names the argument.
        """
        number = getattr(args, "num_experts", None)
        if number is None:
            return None
        for name, expected in _ARGUMENTS.items():
            found = getattr(args, name, expected)
            if found != expected:
                refuse(f"--{flag_of(name)}", expected, found)
        rule = routing_rule(args)
        if rule in ROUTING_RULES:
            wanted = routing_rule(Namespace())
            refuse("--moe-router-load-balancing-type", wanted, rule)
        return cls(
            number=number,
            top_k=args.moe_router_topk,
            ffn_hidden_size=args.moe_ffn_hidden_size or args.ffn_hidden_size,
            renormalised=not getattr(args, "moe_router_pre_softmax", False),
        )

    def to_config(self) -> dict[str, Any]:
        """The fields of a Hugging Face config that say the same, of any family."""
        return {
            "num_experts": self.number,
            "num_local_experts": self.number,
            "num_experts_per_tok": self.top_k,
            "moe_intermediate_size": self.ffn_hidden_size,
            "norm_topk_prob": self.renormalised,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
        }

    def to_flags(self) -> list[list[object]]:
        """Megatron's flags, each with its value."""
        flags: list[list[object]] = [
            ["--num-experts", self.number],
            ["--moe-router-topk", self.top_k],
            ["--moe-ffn-hidden-size", self.ffn_hidden_size],
        ]
        return flags if self.renormalised else [*flags, ["--moe-router-pre-softmax"]]
