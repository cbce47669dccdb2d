"""What a config may ask of the torch-native layers, for the comparison with Megatron's own."""

from typing import Any

import torch

_SELECTIVE = {"recompute_granularity": "selective"}
_EXPERTS: dict[str, Any] = {
    **{"num_moe_experts": 4, "moe_router_topk": 2, "moe_ffn_hidden_size": 24},
    **{"moe_shared_expert_intermediate_size": 16, "moe_router_load_balancing_type": "none"},
}
_GROUPED = _EXPERTS | {"moe_grouped_gemm": True}
# What a config may ask for; each is compared in loss and in every gradient.
CASES = {
    "grouped queries": {},
    "one group a head": {"num_query_groups": 4},
    "one group": {"num_query_groups": 1},
    "query and key norm": {"qk_layernorm": True},
    "query and key L2 norm": {"qk_l2_norm": True},
    "LayerNorm, GELU, biases": {
        "normalization": "LayerNorm",
        "gated_linear_unit": False,
        "activation_func": torch.nn.functional.gelu,
        "add_bias_linear": True,
        "bias_activation_fusion": False,
    },
    "SwiGLU with biases": {"add_bias_linear": True},
    "query bias": {"add_qkv_bias": True},
    "GEGLU": {"activation_func": torch.nn.functional.gelu},
    "core attention recomputed": _SELECTIVE | {"recompute_modules": ["core_attn"]},
    "biases recomputed": _SELECTIVE | {"recompute_modules": ["mlp"], "add_bias_linear": True},
    "all recomputed": {
        **{"recompute_granularity": "full", "recompute_method": "uniform"},
        "recompute_num_layers": 1,
    },
    "head size not hidden / heads": {"kv_channels": 12},
    "scores scaled by layer": {
        **{"apply_query_key_layer_scaling": True, "attention_softmax_in_fp32": True},
    },
    "layers without rotation": {"no_rope_freq": [1, 0]},
    "experts": _EXPERTS,
    "GEGLU experts": _EXPERTS | {"activation_func": torch.nn.functional.gelu},
    "router's weights on the input": _GROUPED
    | {"moe_router_topk": 1, "moe_router_pre_softmax": True, "moe_apply_probs_on_input": True},
    "experts in one product": _GROUPED,
    "their activation recomputed": _GROUPED | _SELECTIVE | {"recompute_modules": ["moe_act"]},
}

# Megatron's own local attention cannot split one query group over two ranks.
TP_CASES = [
    name
    for name, case in CASES.items()
    if name not in ("one group", "all recomputed") and "num_moe_experts" not in case
]
