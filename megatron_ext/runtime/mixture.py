"""Mixtures of experts in half precision: one loss scale, and counts of tokens that stay exact."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch


def share_loss_scale() -> None:
    """Let all parts of the optimizer skip a step, and change fp16's loss scale, together.

    Experts that are spread otherwise than the rest have an optimizer of their own, and with it a loss scale
    of their own, which Megatron changes by what overflows in that part alone. But the loss is scaled once,
    by that of the first part: the scales would drift apart, the gradients of the experts be divided by
    another number than they were multiplied by, and where they alone overflow the step would be skipped for
    ever.

    All ranks come to the same answer: each part asks all ranks that hold any of its weights, pipeline stages
    without experts included, and gradients have been summed over data-parallel ranks by then.
    """
    from megatron.core.optimizer.optimizer import ChainedOptimizer

    prepare, load = ChainedOptimizer.prepare_grads, ChainedOptimizer.load_state_dict

    def prepare_together(self: ChainedOptimizer) -> bool:
        scalers = _scalers(self)
        with ExitStack() as undo:
            for scaler in scalers:
                scaler.update = lambda found_inf: None  # until all parts have been looked at
                undo.callback(delattr, scaler, "update")
            found = bool(prepare(self))
        for scaler in scalers:
            scaler.update(found)
        return found

    def load_together(self: ChainedOptimizer, state_dict: Any) -> None:
        load(self, state_dict)
        scalers = _scalers(self)
        if len(scalers) > 1:  # those of an older checkpoint may differ
            least = min(scalers, key=lambda scaler: float(scaler.scale)).state_dict()
            for scaler in scalers:
                scaler.load_state_dict(least)

    ChainedOptimizer.prepare_grads = prepare_together
    ChainedOptimizer.load_state_dict = load_together


def _scalers(optimizer: Any) -> list[Any]:
    """The loss scales of an optimizer's parts; none but in fp16 or with `--loss-scale`."""
    found = (getattr(part, "grad_scaler", None) for part in optimizer.chained_optimizers)
    return [scaler for scaler in found if scaler is not None]


def count_in_fp32() -> None:
    """Keep a router's counts of tokens in fp32, in which they are whole numbers up to 16 million.

    Megatron casts them to half precision with the model, and casts only what it saves back. In bf16 a count
    ends at 256, and in fp16 it is inf above 65504: experts would be balanced by wrong numbers, or not at all.
    No checkpoint holds them.
    """
    from megatron.core.transformer.moe.router import TopKRouter

    maintain = TopKRouter._maintain_float32_expert_bias

    def maintain_counts_too(self: TopKRouter) -> None:
        maintain(self)
        for name in ("local_tokens_per_expert", "global_tokens_per_expert", "ga_steps"):
            count = getattr(self, name, None)
            if count is not None and count.dtype != torch.float32:
                count.data = count.data.float()

    TopKRouter._maintain_float32_expert_bias = maintain_counts_too
