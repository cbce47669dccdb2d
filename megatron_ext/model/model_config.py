"""Megatron's model config from its arguments, with what megatron-core 0.19.2 leaves out."""

from __future__ import annotations

from argparse import Namespace
from typing import Any

from megatron.training.argument_utils import gpt_config_from_args

from megatron_ext.exceptions import refused_by_megatron
from megatron_ext.model.layer_spec import check_config, torch_native_spec_for_builder
from megatron_ext.model.te_documents import te_spec_within_documents


def model_config_from_args(args: Namespace) -> Any:
    """The config that the model and its reference are built from.

    Megatron reads `--rope-scaling-factor` into its arguments and then does not hand it on, so every model
    would be built with 8, the factor of Llama 3.1; Llama 3.2 has 32. By default it also asks for a fused
    activation where its layers have none, and then fails.

    Args:
        args: Megatron's validated arguments.

    Returns:
        `megatron.training.models.gpt.GPTModelConfig`.

    Raises:
        ConfigError: Megatron-Core refuses the model, or the torch-native layers are used and do not compute
            what is asked for.
    """
    if not fuses_activation(args):
        args.bias_gelu_fusion = False
    try:
        config = gpt_config_from_args(args)
    except (AssertionError, ValueError) as error:
        raise refused_by_megatron(error) from error
    config.rope_scaling_factor = args.rope_scaling_factor
    if args.spec is None and args.transformer_impl == "local":
        # The builder checks too, but only once all process groups are up.
        check_config(config.transformer)
        config.transformer_layer_spec = torch_native_spec_for_builder
    elif args.spec is None and args.dataloader_inter_document_masking:
        config.transformer_layer_spec = te_spec_within_documents
    return config


def fuses_activation(args: Namespace) -> bool:
    """Whether all layers have a kernel for a bias with the activation, where it is not SwiGLU.

    In Megatron dense layers and shared experts have one for GELU, and the experts that tokens are routed to
    for the quick GEGLU; a layer without one ends the first step.

    Args:
        args: Megatron's validated arguments.
    """
    if args.swiglu:
        return True  # by a flag of its own
    if args.num_experts is None:
        return not (args.squared_relu or args.quick_geglu)
    routed = args.moe_layer_freq in (1, [1] * args.num_layers)
    return bool(args.quick_geglu) and routed and not args.moe_shared_expert_intermediate_size
