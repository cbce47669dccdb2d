"""Layer spec of a GPT in plain torch, for machines without Transformer Engine.

Megatron's local spec holds whole attention matrices and refuses sequence parallelism; this one does
neither. Modules, parameter names and checkpoint keys are those of the local spec, whose key map in
turn gives the keys of the Transformer Engine spec (there the norms live inside the linear layers
that follow them), so a checkpoint of either loads here, and the reverse.
"""

from collections.abc import Callable
from typing import Any

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec_for_backend
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer import ModuleSpec, TransformerConfig
from megatron.core.transformer.attention import SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType, LayerType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.torch_norm import L2Norm
from megatron.core.transformer.transformer_block import (
    TransformerBlock,
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)
from megatron.core.transformer.transformer_layer import (
    TransformerLayer,
    TransformerLayerSubmodules,
    get_transformer_layer_offset,
)

from megatron_ext.exceptions import ConfigError
from megatron_ext.model.attention import SdpaCoreAttention, TorchSelfAttention
from megatron_ext.model.experts import TorchSpecProvider, check_grouped
from megatron_ext.model.mlp import TorchMLP
from megatron_ext.model.norm import TorchNorm

# Field of the config -> what to call it in the error, for what must be left unset. Other architectures are
# refused before (refusals.py).
UNSUPPORTED = {
    "window_size": "sliding-window attention (--window-size)",
    "attention_output_gate": "gated attention output (--attention-output-gate)",
    "experimental_attention_variant": "--experimental-attention-variant",
    "heterogeneous_block_specs": "heterogeneous layers (--heterogeneous-layers-config-path)",
    "qk_clip": "--qk-clip",
    "log_max_attention_logit": "--log-max-attention-logit",
    "fp8": "fp8",
    "fp4": "fp4",
    "quant_recipe": "per-layer precision (--te-precision-config-file)",
    "use_kitchen": "quantization with NVIDIA's kitchen package",
    "fused_residual_rmsnorm": "--fused-residual-rmsnorm",
    "fine_grained_activation_offloading": "--fine-grained-activation-offloading",
    "cpu_offloading": "activation offloading to the host (--cpu-offloading-num-layers)",
    "rotary_interleaved": "interleaved rotary embedding (--rotary-interleaved)",
    "mrope_section": "multi-dimensional rotary embedding (--mrope-section)",
    "use_te_activation_func": "Transformer Engine's activation function (--use-te-activation-func)",
    "batch_invariant_mode": "--batch-invariant-mode",
    # Megatron adds an expert's bias in place, to a view that autograd does not let it write to.
    "add_bias_linear": "biases of experts (--num-experts without --disable-bias-linear)",
    "moe_mlp_glu_interleave_size": "--moe-mlp-glu-interleave-size",
    "moe_permute_fusion": "--moe-permute-fusion",
    "moe_router_fusion": "--moe-router-fusion",
    "moe_latent_size": "--moe-latent-size",
    "softmax_type": "--softmax-type other than vanilla",
    "cuda_graph_impl": "--cuda-graph-impl transformer_engine",
}
# Of these, some values are fine though they are set.
_FINE: dict[str, Callable[[Any], bool]] = {
    "softmax_type": lambda kind: kind == "vanilla",
    "cuda_graph_impl": lambda kind: kind != "transformer_engine",
}


def check_config(config: TransformerConfig) -> None:
    """Refuse what the torch-native layers do not compute.

    Raises:
        ConfigError: The config asks for something of Transformer Engine or of another attention;
            the message names all of it. Or see `check_grouped`.
    """
    values = {field: getattr(config, field, None) for field in UNSUPPORTED}
    if config.num_moe_experts is None:
        del values["add_bias_linear"]
    wrong = [
        UNSUPPORTED[field] + (f", found {value}" if field in _FINE else "")
        for field, value in values.items()
        if value and not (field in _FINE and _FINE[field](value))
    ]
    if wrong:
        raise ConfigError(f"the torch-native layers do not support: {'; '.join(wrong)}")
    check_grouped(config)


def _layer_spec(config: TransformerConfig, *, experts: bool) -> ModuleSpec:
    """Spec of a layer: dense, or a mixture of experts with Megatron's own router and dispatcher."""
    if config.qk_l2_norm:
        qk_norm: type = L2Norm
    else:
        qk_norm = TorchNorm if config.qk_layernorm else IdentityOp
    attention = ModuleSpec(
        module=TorchSelfAttention,
        params={"attn_mask_type": AttnMaskType.causal},
        submodules=SelfAttentionSubmodules(
            linear_qkv=ColumnParallelLinear,
            core_attention=SdpaCoreAttention,
            linear_proj=RowParallelLinear,
            q_layernorm=qk_norm,
            k_layernorm=qk_norm,
        ),
    )
    keys = {"input_layernorm.": "self_attention.linear_qkv.layer_norm_"}
    if experts:
        # Transformer Engine too keeps the norm before a router apart.
        mlp = get_moe_module_spec_for_backend(
            TorchSpecProvider(), num_experts=config.num_moe_experts
        )
    else:
        dense = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
        mlp = TorchMLP.builder(dense)
        keys["pre_mlp_layernorm."] = "mlp.linear_fc1.layer_norm_"
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=TorchNorm,
            self_attention=attention,
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=TorchNorm,
            mlp=mlp,
            mlp_bda=get_bias_dropout_add,
            sharded_state_dict_keys_map=keys,
        ),
    )


def _have_experts(config: TransformerConfig) -> list[bool]:
    """Of every layer of the model, whether it is a mixture of experts."""
    if config.num_moe_experts is None:
        return [False] * config.num_layers
    every = config.moe_layer_freq
    if isinstance(every, int):
        return [layer % every == 0 for layer in range(config.num_layers)]
    if len(every) != config.num_layers or not {*every} <= {0, 1}:
        raise ConfigError(
            f"--moe-layer-freq: expected a number, or 0 or 1 for each of {config.num_layers} layers, "
            f"found {every}"
        )
    return [bool(one) for one in every]


def _own_layers(config: TransformerConfig, vp_stage: int | None, pp_rank: int | None) -> list[int]:
    """The model's layers, from 0, that a stage or its chunk builds."""
    layout = config.pipeline_model_parallel_layout
    if layout is not None:
        return layout.get_layer_id_list(
            layer_type=LayerType.decoder, vp_stage=vp_stage, pp_rank=pp_rank
        )
    start = get_transformer_layer_offset(config, vp_stage, pp_rank)
    return list(range(start, start + get_num_layers_to_build(config, vp_stage, pp_rank)))


def torch_native_layer_spec(
    config: TransformerConfig, *, vp_stage: int | None = None, pp_rank: int | None = None
) -> ModuleSpec:
    """Spec of the decoder block, for `GPTModel(transformer_layer_spec=...)`.

    A block and not a layer, because Megatron would complete a layer with its own final norm, which
    refuses sequence parallelism.

    Args:
        config: Model config.
        vp_stage: Virtual pipeline stage of the model chunk, None without virtual stages.
        pp_rank: Pipeline rank; this process's own where None.

    Raises:
        ConfigError: See `check_config`.
    """
    check_config(config)
    experts = _have_experts(config)
    specs = {kind: _layer_spec(config, experts=kind) for kind in {*experts}}
    layers = [specs[experts[layer]] for layer in _own_layers(config, vp_stage, pp_rank)]
    return ModuleSpec(
        module=TransformerBlock,
        submodules=TransformerBlockSubmodules(layer_specs=layers, layer_norm=TorchNorm),
    )


def torch_native_spec_for_builder(model_config: Any, vp_stage: int | None = None) -> ModuleSpec:
    """`torch_native_layer_spec` as `GPTModelConfig.transformer_layer_spec` and `--spec` call it.

    Args:
        model_config: `megatron.training.models.gpt.GPTModelConfig`.
        vp_stage: Virtual pipeline stage of the model chunk.
    """
    return torch_native_layer_spec(model_config.transformer, vp_stage=vp_stage)
