"""The unlearning objective in plain torch. Process groups are arguments; Megatron is not needed."""

from megatron_ext.losses.divergence import reference_kl
from megatron_ext.losses.head import HeadOutput, unlearning_head
from megatron_ext.losses.head_loss import HeadLoss, Places, TokenLoss, unlearning_head_loss
from megatron_ext.losses.margin import target_margin
from megatron_ext.losses.objectives import (
    FORGET_LOSSES,
    bounded_forgetting,
    cross_entropy,
    gradient_ascent,
)
from megatron_ext.losses.terms import Terms, unlearning_terms

__all__ = [
    "FORGET_LOSSES",
    "HeadLoss",
    "HeadOutput",
    "Places",
    "Terms",
    "TokenLoss",
    "bounded_forgetting",
    "cross_entropy",
    "gradient_ascent",
    "reference_kl",
    "target_margin",
    "unlearning_head",
    "unlearning_head_loss",
    "unlearning_terms",
]
