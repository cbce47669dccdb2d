"""The forward step of plain pre-training and continued pre-training: Megatron's own, loss included."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.transformer.module import MegatronModule
from megatron.core.utils import get_attr_wrapped_model
from megatron.training import get_timers

from megatron_ext import balancing
from megatron_ext.data.batch import MicroBatch, count_pairs, read_micro_batch
from megatron_ext.dataset_losses import DatasetLosses
from megatron_ext.finite import FiniteGuard
from megatron_ext.head import head_loss, sequence_major
from megatron_ext.losses import Places, cross_entropy
from megatron_ext.runtime import straggler


class PlainStep:
    """Megatron's ``forward_step_func`` for next-token prediction.

    Args:
        args: Megatron's validated arguments.
        per_dataset: whether the loss of each dataset is logged too.
    """

    def __init__(self, args: Namespace, *, per_dataset: bool = False) -> None:
        self.args = args
        self.guard = FiniteGuard(args)
        self.datasets = DatasetLosses(args, _Losses()) if per_dataset else None

    def install(self) -> None:
        """Put the guard against NaN around Megatron's schedule, and what balances experts inside."""
        if balancing.is_needed(self.args):
            balancing.install()
        if self.datasets is not None:
            self.datasets.install()
        self.guard.install()

    def forward_step(
        self, data_iterator: Iterator[dict[str, torch.Tensor]] | None, model: MegatronModule
    ) -> tuple[torch.Tensor, Callable[..., Any]]:
        """Forward pass of one microbatch; the last stage's output is the sum of its losses."""
        timer = get_timers()("batch-generator", log_level=2)
        timer.start()
        vp_stage = get_attr_wrapped_model(model, "vp_stage")
        with straggler.watched(self.args, reading=True):
            batch = read_micro_batch(
                data_iterator,
                args=self.args,
                vp_stage=vp_stage,
                # Validation may use another size; the schedule sees it in the tensors.
                micro_batch_size=self._micro_batch_size(model),
            )
        timer.stop()
        if model.training and not vp_stage:
            count_pairs([batch])
        index = self.guard.begin(model, batch)
        with straggler.watched(self.args):
            output = model(
                batch.tokens,
                batch.position_ids,
                batch.attention_mask,
                packed_seq_params=batch.documents,
                labels=batch.labels,
                loss_mask=batch.loss_mask,
                output_processor=self._head(batch, training=model.training),
            )
        return output, partial(self.loss, batch.loss_mask, index)

    def _head(self, batch: MicroBatch, *, training: bool) -> Callable[..., torch.Tensor]:
        """Megatron's ``output_processor`` on the last stage."""
        if self.datasets is None:
            return summed_loss
        datasets = self.datasets

        def process(**arguments: Any) -> torch.Tensor:
            loss, terms = loss_and_terms(**arguments)
            datasets.add(batch, terms, training=training)
            return loss

        return process

    def loss(
        self, loss_mask: torch.Tensor | None, index: int, loss: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
        """Sum of the losses, number of tokens and report, as Megatron averages them.

        Megatron divides each context-parallel rank's sum by that rank's tokens and averages over ranks,
        which weighs a token by how few others its rank has. Here a microbatch's mean does not depend on
        how its sequences are split.

        Args:
            loss_mask: ``[b, s]``, 1 where a token counts.
            index: number of the microbatch, from the guard.
            loss: fp32 scalar, the cross-entropies of these tokens summed, in nats.
        """
        assert loss_mask is not None
        tokens = loss_mask.sum().to(torch.int)
        self.guard.check_loss(loss, index)
        report = torch.cat((loss.detach().view(1), tokens.view(1)))
        group = parallel_state.get_context_parallel_group()
        if group.size() > 1 and not self.args.calculate_per_token_loss:
            tokens = tokens.clone()
            torch.distributed.all_reduce(tokens, group=group)
            loss = loss * group.size()  # its gradient is averaged over these ranks too
        return loss, tokens, {"lm loss": report}

    def _micro_batch_size(self, model: MegatronModule) -> int:
        return int(
            self.args.micro_batch_size if model.training else self.args.eval_micro_batch_size
        )


def summed_loss(**arguments: Any) -> torch.Tensor:
    """Megatron's ``output_processor`` of plain training: the loss of :func:`loss_and_terms`."""
    return loss_and_terms(**arguments)[0]


def loss_and_terms(
    *,
    loss_mask: torch.Tensor | None,
    hidden_states: torch.Tensor,
    output_layer: torch.nn.Module,
    output_weight: torch.Tensor | None,
    labels: torch.Tensor,
    **_: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cross-entropy, summed over the tokens that count, and the terms that it is made of.

    Padded vocabulary columns take part, as they do in Megatron's own loss.

    Args:
        loss_mask: ``[b, s]``, 1 where a token counts.
        hidden_states: as in :func:`~megatron_ext.head.head_margins`, like the others.
        output_layer: see there.
        output_weight: see there.
        labels: see there.

    Returns:
        fp32 scalar; and the terms of :func:`~megatron_ext.head.head_loss`.
    """
    mask = sequence_major(loss_mask)

    def token_loss(margin: torch.Tensor, _: torch.Tensor, places: Places) -> torch.Tensor:
        return (cross_entropy(margin) * mask[places]).sum()

    return head_loss(
        hidden_states,
        token_loss,
        output_layer=output_layer,
        output_weight=output_weight,
        labels=labels,
        vocab_size=None,
    )


class _Losses:
    """What is logged of each dataset."""

    width = 1
    told: tuple[str, ...] = ("lm loss",)

    def sums(self, terms: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return (cross_entropy(terms[:1]) * mask).sum(dim=-1)

    def of_dataset(self, sums: Sequence[float], tokens: float, _: bool) -> dict[str, float]:
        return {"lm loss": sums[0] / tokens}
