"""The language-model head: from final hidden states to the terms of every token.

``GPTModel.forward(..., output_processor=...)`` hands the hidden states and the output layer over here
instead of computing logits and a loss by itself. Legend: s tokens of a sequence on this rank, b
sequences of a microbatch, H hidden size, V columns of this rank's vocabulary shard.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core import parallel_state

from megatron_ext.exceptions import ConfigError
from megatron_ext.losses import cross_entropy, unlearning_head


def head_terms(
    hidden_states: torch.Tensor,
    *,
    output_layer: torch.nn.Module,
    output_weight: torch.Tensor | None,
    labels: torch.Tensor,
    vocab_size: int | None,
    reference_hidden: torch.Tensor | None = None,
    reference_weight: torch.Tensor | None = None,
    fp32_logits: bool = False,
) -> torch.Tensor:
    """Margin and reference KL of every token of a microbatch.

    Args:
        hidden_states: ``[s, b, H]``, or ``[s/tp, b, H]`` under sequence parallelism.
        output_layer: Megatron's column-parallel output layer.
        output_weight: the tied embedding weight ``[V, H]``, or ``None`` where the layer has its own.
        labels: int64 ``[b, s]``.
        vocab_size: real columns of the vocabulary over all shards; ``None`` counts padding as Megatron does.
        reference_hidden: like ``hidden_states``, of the reference; ``None`` leaves every KL at 0.
        reference_weight: ``[V, H]``, the reference's output weight.
        fp32_logits: leave the logits unrounded (see ``unlearning_head``).

    Returns:
        fp32 ``[2, s * b]``: margins and KLs, sequence-major.
    """
    _run_forward_pre_hooks(output_layer, hidden_states)
    weight = output_weight if output_weight is not None else output_layer.get_parameter("weight")
    flat_labels = labels.transpose(0, 1).reshape(-1)
    # All tokens of a microbatch have one role. On the CPU, so that counting them does not wait for the GPU.
    roles = torch.ones(flat_labels.shape, dtype=torch.int8)
    terms = unlearning_head(
        hidden_states.flatten(0, 1),
        weight,
        flat_labels,
        roles,
        reference_hidden=None if reference_hidden is None else reference_hidden.flatten(0, 1),
        reference_weight=reference_weight,
        tp_group=parallel_state.get_tensor_model_parallel_group(),
        sequence_parallel=bool(output_layer.sequence_parallel),
        vocab_size=vocab_size,
        fp32_logits=fp32_logits,
        fuse_weight_gradient=weight.requires_grad,
    )
    return torch.stack((terms.margin, terms.kl))


def token_losses(
    *,
    hidden_states: torch.Tensor,
    output_layer: torch.nn.Module,
    output_weight: torch.Tensor | None,
    labels: torch.Tensor,
    **_: Any,
) -> torch.Tensor:
    """Megatron's ``output_processor`` of plain training: cross-entropy of every token, fp32 ``[b, s]``.

    Padded vocabulary columns take part, as they do in Megatron's own loss.
    """
    terms = head_terms(
        hidden_states,
        output_layer=output_layer,
        output_weight=output_weight,
        labels=labels,
        vocab_size=None,
    )
    batch, length = labels.shape
    return cross_entropy(terms[0]).view(length, batch).transpose(0, 1).contiguous()


def _run_forward_pre_hooks(module: torch.nn.Module, *inputs: torch.Tensor) -> None:
    """Run what is due before a module's weight is read.

    With ``--overlap-param-gather`` DDP finishes the all-gather of a module's parameters in such a hook;
    reading ``output_layer.weight`` without it would use the weights of the step before.
    """
    for hook_id, hook in module._forward_pre_hooks.items():
        if hook_id in module._forward_pre_hooks_with_kwargs:
            changed = hook(module, inputs, {})
        else:
            changed = hook(module, inputs)
        if changed is not None:
            raise ConfigError(
                f"{type(module).__name__}: expected forward pre-hooks that leave the inputs alone, found "
                f"{hook!r}; the fused head reads the layer's weight directly"
            )
