"""The forward step of plain pre-training and continued pre-training: Megatron's own, loss included."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from megatron.core.transformer.module import MegatronModule
from megatron.core.utils import get_attr_wrapped_model
from megatron.training import get_timers

from megatron_ext.data.batch import read_micro_batch
from megatron_ext.finite import FiniteGuard
from megatron_ext.head import token_losses


class PlainStep:
    """Megatron's ``forward_step_func`` for next-token prediction.

    Args:
        args: Megatron's validated arguments.
    """

    def __init__(self, args: Namespace) -> None:
        self.args = args
        self.guard = FiniteGuard(args)

    def install(self) -> None:
        """Put the guard against NaN around Megatron's schedule."""
        self.guard.install()

    def forward_step(
        self, data_iterator: Iterator[dict[str, torch.Tensor]] | None, model: MegatronModule
    ) -> tuple[torch.Tensor, Callable[..., Any]]:
        """Forward pass of one microbatch; the output is the loss of every token, ``[b, s]``."""
        timer = get_timers()("batch-generator", log_level=2)
        timer.start()
        batch = read_micro_batch(
            data_iterator,
            args=self.args,
            vp_stage=get_attr_wrapped_model(model, "vp_stage"),
            # Validation may use another size; the schedule sees it in the tensors.
            micro_batch_size=self._micro_batch_size(model),
        )
        timer.stop()
        index = self.guard.begin(model, batch)
        output = model(
            batch.tokens,
            batch.position_ids,
            batch.attention_mask,
            labels=batch.labels,
            output_processor=token_losses,
        )
        return output, partial(self.loss, batch.loss_mask, index)

    def loss(
        self, loss_mask: torch.Tensor | None, index: int, output: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
        """Sum of the losses, number of tokens and report, as Megatron averages them.

        Args:
            loss_mask: ``[b, s]``, 1 where a token counts.
            index: number of the microbatch, from the guard.
            output: fp32 ``[b, s]``, cross-entropy of every token in nats.
        """
        assert loss_mask is not None
        mask = loss_mask.view(-1).float()
        loss = (output.view(-1).float() * mask).sum()
        tokens = mask.sum().to(torch.int)
        self.guard.check_loss(loss, index)
        report = torch.cat((loss.detach().view(1), tokens.view(1)))
        return loss, tokens, {"lm loss": report}

    def _micro_batch_size(self, model: MegatronModule) -> int:
        return int(
            self.args.micro_batch_size if model.training else self.args.eval_micro_batch_size
        )
