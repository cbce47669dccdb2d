"""The language-model head: from final hidden states to the terms of every token.

``GPTModel.forward(..., output_processor=...)`` hands the hidden states and the output layer over here
instead of computing logits and a loss by itself. Legend: s tokens of a sequence on this rank, b
sequences of a microbatch, H hidden size, V columns of this rank's vocabulary shard.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core import parallel_state

from megatron_ext.losses import TokenLoss, unlearning_head, unlearning_head_loss
from megatron_ext.model.hooks import run_forward_pre_hooks


def head_margins(
    hidden_states: torch.Tensor,
    *,
    output_layer: torch.nn.Module,
    output_weight: torch.Tensor | None,
    labels: torch.Tensor,
    vocab_size: int,
    fp32_logits: bool,
) -> torch.Tensor:
    """Margin of every token of a microbatch.

    Args:
        hidden_states: ``[s, b, H]``, or ``[s/tp, b, H]`` under sequence parallelism.
        output_layer: Megatron's column-parallel output layer.
        output_weight: the tied embedding weight ``[V, H]``, or ``None`` where the layer has its own.
        labels: int64 ``[b, s]``.
        vocab_size: real columns of the vocabulary over all shards.
        fp32_logits: leave the logits unrounded (see ``unlearning_head``).

    Returns:
        fp32 ``[s * b]``, sequence-major.
    """
    return unlearning_head(
        **_head_arguments(hidden_states, output_layer, output_weight, labels, None),
        vocab_size=vocab_size,
        fp32_logits=fp32_logits,
    ).margin


def head_loss(
    hidden_states: torch.Tensor,
    token_loss: TokenLoss,
    *,
    output_layer: torch.nn.Module,
    output_weight: torch.Tensor | None,
    labels: torch.Tensor,
    vocab_size: int | None,
    reference_hidden: torch.Tensor | None = None,
    reference_weight: torch.Tensor | None = None,
    fp32_logits: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss of a microbatch, and the terms it is made of.

    Args:
        hidden_states: as in :func:`head_margins`, like all arguments that are not described here.
        token_loss: the loss, a sum over tokens, of the margins and KLs of any of them (see
            ``unlearning_head_loss``); places are sequence-major.
        output_layer: see there.
        output_weight: see there.
        labels: see there.
        vocab_size: see there; ``None`` counts padding as Megatron does.
        reference_hidden: like ``hidden_states``, of the reference; ``None`` leaves every KL at 0.
        reference_weight: ``[V, H]``, the reference's output weight.
        fp32_logits: see there.

    Returns:
        The scalar loss, and fp32 ``[2, s * b]``: margins and KLs, sequence-major, without a gradient.
    """
    out = unlearning_head_loss(
        token_loss=token_loss,
        **_head_arguments(hidden_states, output_layer, output_weight, labels, reference_hidden),
        reference_weight=reference_weight,
        vocab_size=vocab_size,
        fp32_logits=fp32_logits,
    )
    return out.loss, torch.stack((out.margin, out.kl))


def sequence_major(tokens: torch.Tensor | None) -> torch.Tensor:
    """Labels or mask of a microbatch, ``[b, s]``, in the order of the head, ``[s * b]``."""
    assert tokens is not None
    return tokens.transpose(0, 1).reshape(-1)


def _head_arguments(
    hidden_states: torch.Tensor,
    output_layer: torch.nn.Module,
    output_weight: torch.Tensor | None,
    labels: torch.Tensor,
    reference_hidden: torch.Tensor | None,
) -> dict[str, Any]:
    """What the layer and the tensors of a microbatch mean to the head."""
    run_forward_pre_hooks(output_layer, hidden_states)
    weight = output_weight if output_weight is not None else output_layer.get_parameter("weight")
    return {
        "hidden": hidden_states.flatten(0, 1),
        "weight": weight,
        "labels": sequence_major(labels),
        # All tokens of a microbatch have one role. On the CPU: counting them does not wait for the GPU.
        "roles": torch.ones(labels.numel(), dtype=torch.int8),
        "reference_hidden": None if reference_hidden is None else reference_hidden.flatten(0, 1),
        "tp_group": parallel_state.get_tensor_model_parallel_group(),
        "sequence_parallel": bool(output_layer.sequence_parallel),
        "fuse_weight_gradient": weight.requires_grad,
    }
