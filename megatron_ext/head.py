"""The language-model head: from final hidden states to the terms of every token.

``GPTModel.forward(..., output_processor=...)`` hands the hidden states and the output layer over here
instead of computing logits and a loss by itself.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from megatron.core import parallel_state

from megatron_ext.data.batch import MicroBatch
from megatron_ext.losses import unlearning_terms

if TYPE_CHECKING:
    from megatron_ext.reference import FrozenReference
    from megatron_ext.training import UnlearnStep


def head_terms(
    *,
    hidden_states: torch.Tensor,
    output_layer: torch.nn.Module,
    output_weight: torch.Tensor | None,
    batch: MicroBatch,
    step: UnlearnStep,
    reference: FrozenReference | None,
    **_: Any,
) -> torch.Tensor:
    """Margin and reference KL of every token of a microbatch.

    Args:
        hidden_states: ``[s, b, H]``, or ``[s/tp, b, H]`` under sequence parallelism.
        output_layer: Megatron's column-parallel output layer.
        output_weight: the tied embedding weight ``[V/tp, H]``, or ``None`` where the layer has its own.
        batch: labels ``[b, s]`` and the context of the step.
        step: for the arguments of the run.
        reference: the frozen reference, for its output weight.

    Returns:
        fp32 ``[2, s * b]``: margins and KLs, sequence-major.
    """
    assert batch.labels is not None
    labels = batch.labels.transpose(0, 1).contiguous()
    logits, _bias = output_layer(hidden_states, weight=output_weight)
    reference_logits = None
    hidden = batch.context.reference_hidden
    if hidden is not None:
        assert reference is not None
        with torch.no_grad():
            reference_logits, _bias = output_layer(hidden, weight=reference.output_weight())
        batch.context.reference_hidden = None
    terms = unlearning_terms(
        logits,
        labels,
        reference_logits=reference_logits,
        tp_group=parallel_state.get_tensor_model_parallel_group(),
        vocab_size=step.args.unpadded_vocab_size,
    )
    return torch.stack((terms.margin.flatten(), terms.kl.flatten()))
