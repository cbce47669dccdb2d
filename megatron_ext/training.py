"""The training step: Megatron's schedule with the unlearning objective around and inside it.

``train_step`` and ``evaluate`` of Megatron call whatever ``get_forward_backward_func`` returns. The
wrapped schedule reads all microbatches of the step first, because two things need them before the
student's first backward pass: the reference's hidden states, and the number of forgotten and replayed
tokens in the whole global batch, by which each term is averaged.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.transformer.module import MegatronModule
from megatron.core.utils import get_attr_wrapped_model
from megatron.training import get_timers

from megatron_ext.config import UnlearnConfig
from megatron_ext.data.batch import MicroBatch, StepContext, count_pairs, read_micro_batch
from megatron_ext.data.providers import forget_blends
from megatron_ext.dataset_losses import DatasetLosses
from megatron_ext.finite import FiniteGuard
from megatron_ext.head import head_loss, sequence_major
from megatron_ext.losses import Places
from megatron_ext.objective import Objective
from megatron_ext.reference import FrozenReference, count_operations
from megatron_ext.runtime import gathers, loaders, straggler
from megatron_ext.watch import Watch


class UnlearnStep:
    """One unlearning step, or validation step, around Megatron's own schedule.

    Args:
        args: Megatron's validated arguments.
        config: the settings of unlearning.
        reference: returns the frozen reference, built by then, or ``None`` where the objective has none.
        per_dataset: whether the terms of each dataset are logged too.
    """

    def __init__(
        self,
        args: Namespace,
        config: UnlearnConfig,
        *,
        reference: Callable[[], FrozenReference | None],
        per_dataset: bool = False,
    ) -> None:
        self.args = args
        self.config = config
        self.objective = Objective(config)
        self.watch = Watch(args, config)
        self.guard = FiniteGuard(args)
        self.datasets = (
            DatasetLosses(args, self.objective, forget_blends(config)) if per_dataset else None
        )
        self._reference = reference

    def install(self) -> None:
        """Put the step into Megatron's loop: its schedule getter, its ``evaluate``, and the watch."""
        import megatron.training.training as loop

        get_schedule, evaluate = loop.get_forward_backward_func, loop.evaluate

        def get_wrapped_schedule(*args: Any, **kwargs: Any) -> Callable[..., Any]:
            return partial(self.forward_backward, get_schedule(*args, **kwargs))

        def evaluate_and_derive(*args: Any, **kwargs: Any) -> Any:
            totals, collected, out_of_time = evaluate(*args, **kwargs)
            return (self.objective.derive(totals) if totals else totals), collected, out_of_time

        loop.get_forward_backward_func = get_wrapped_schedule
        loop.evaluate = evaluate_and_derive
        count_operations(self.config)
        loaders.fetch_whole_steps()
        self.watch.install()
        if self.datasets is not None:
            self.datasets.install()
        self.guard.install()  # last, and so around the schedule of this step

    def forward_backward(
        self,
        schedule: Callable[..., Any],
        *,
        forward_step_func: Callable[..., Any],
        data_iterator: Any,
        model: list[MegatronModule],
        num_microbatches: int,
        seq_length: int,
        micro_batch_size: int,
        forward_only: bool = False,
        **schedule_arguments: Any,
    ) -> list[dict[str, torch.Tensor]]:
        """Run a step; the signature is that of Megatron's schedules.

        Returns:
            On the last stage one dictionary of metrics, already reduced over the data-parallel ranks:
            scalars in training; ``[sum, tokens]`` in validation, where Megatron adds batches up. An empty
            list on other stages.
        """
        forget_count = self._forget_microbatches(num_microbatches, micro_batch_size)
        batches = self._read(data_iterator, model, num_microbatches, forget_count, micro_batch_size)
        if not forward_only:
            count_pairs(batches[0])
        reference = self._reference()
        hidden: list[torch.Tensor] = []
        if reference is not None:
            if not forward_only:
                gathers.gather_ahead(self.args, model)
            hidden = reference.hidden_states(
                schedule,
                [chunk[forget_count:] for chunk in batches],
                seq_length=seq_length,
                micro_batch_size=micro_batch_size,
                decoder_seq_length=schedule_arguments.get("decoder_seq_length"),
                offload=self.config.reference_hidden_offload,
            )
        last = parallel_state.is_pipeline_last_stage(ignore_virtual=True)
        if last:
            self._attach_context(batches[-1], forget_count, hidden)
        iterators = [iter(chunk) for chunk in batches]
        reports = schedule(
            forward_step_func=forward_step_func,
            data_iterator=iterators if len(iterators) > 1 else iterators[0],
            model=model,
            num_microbatches=num_microbatches,
            seq_length=seq_length,
            micro_batch_size=micro_batch_size,
            forward_only=forward_only,
            **schedule_arguments,
        )
        if not last:
            return []
        context = batches[-1][0].context
        assert context is not None
        return [self._metrics(reports, context.tokens, forward_only)]

    def forward_step(
        self, data_iterator: Iterator[MicroBatch], model: MegatronModule
    ) -> tuple[torch.Tensor, Callable[..., Any]]:
        """Forward pass of one microbatch through one model chunk; Megatron's ``forward_step_func``."""
        timer = get_timers()("batch-generator", log_level=2)
        timer.start()
        batch = next(data_iterator)
        timer.stop()
        index = self.guard.begin(model, batch)
        with straggler.watched(self.args):
            output = model(
                batch.tokens,
                batch.position_ids,
                batch.attention_mask,
                packed_seq_params=batch.documents,
                output_processor=partial(self._head, batch),
            )
        return output, partial(self.loss, batch, index, training=model.training)

    def _head(
        self,
        batch: MicroBatch,
        *,
        hidden_states: torch.Tensor,
        output_layer: torch.nn.Module,
        output_weight: torch.Tensor | None,
        **_: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Megatron's ``output_processor`` on the last stage: the loss and the terms, see :meth:`loss`."""
        assert batch.labels is not None
        assert batch.context is not None
        hidden, batch.context.reference_hidden = batch.context.reference_hidden, None
        if hidden is not None:
            hidden = hidden.to(hidden_states.device, non_blocking=True)  # it may wait on the host
        reference = self._reference()
        loss, terms = head_loss(
            hidden_states,
            partial(self._token_loss, batch.context, sequence_major(batch.loss_mask)),
            output_layer=output_layer,
            output_weight=output_weight,
            labels=batch.labels,
            vocab_size=self.args.unpadded_vocab_size,
            reference_hidden=hidden,
            reference_weight=None
            if hidden is None or reference is None
            else reference.output_weight(),
            fp32_logits=self.config.fp32_logits,
        )
        if self.config.max_replay_increase is None or hidden is None or reference is None:
            return loss, terms
        margins = reference.margins(hidden, batch.labels, fp32_logits=self.config.fp32_logits)
        return loss, torch.cat((terms, margins[None]))

    def _token_loss(
        self,
        context: StepContext,
        mask: torch.Tensor,
        margin: torch.Tensor,
        kl: torch.Tensor,
        places: Places,
    ) -> torch.Tensor:
        """What some tokens bring to the global batch's loss; a ``TokenLoss`` but for the first two."""
        sums = self.objective.sums(torch.stack((margin, kl)), mask[places])
        return self.objective.loss(sums, context.tokens) * context.scale

    def loss(
        self,
        batch: MicroBatch,
        index: int,
        output: tuple[torch.Tensor, torch.Tensor],
        *,
        training: bool,
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """A microbatch's part of the global batch's loss.

        Args:
            batch: the microbatch; its signed ``loss_mask`` ``[b, s]`` gives each token's role.
            index: its number, from the guard.
            output: the loss; and the terms, fp32 ``[2, s * b]`` or ``[3, s * b]``, as ``Objective.sums``
                takes them, in the order of the head.
            training: whether this is a step, or else validation.

        Returns:
            The loss, scaled so that Megatron's averaging over microbatches and ranks makes it a sum; and
            ``sums``, fp64 ``[5]``, from ``Objective.sums``.
        """
        loss, terms = output
        self.guard.check_loss(loss, index)
        if self.datasets is not None:
            self.datasets.add(batch, terms, training=training)
        return loss, {"sums": self.objective.sums(terms, sequence_major(batch.loss_mask))}

    def _forget_microbatches(self, num_microbatches: int, micro_batch_size: int) -> int:
        """The first microbatches of a batch are forgotten, on every data-parallel rank alike."""
        unit = micro_batch_size * self.args.data_parallel_size
        samples = self.config.forget_samples(
            num_microbatches * unit, train_global_batch_size=self.args.global_batch_size
        )
        assert samples % unit == 0, "checked when the arguments were parsed"
        return samples // unit

    def _read(
        self,
        data_iterator: Any,
        model: list[MegatronModule],
        num_microbatches: int,
        forget_count: int,
        micro_batch_size: int,
    ) -> list[list[MicroBatch]]:
        """All microbatches of the step for each model chunk of this rank."""
        iterators = data_iterator if isinstance(data_iterator, list) else [data_iterator]
        batches: list[list[MicroBatch]] = []
        for iterator, chunk in zip(iterators, model, strict=True):
            batches.append([])
            for index in range(num_microbatches):
                with straggler.watched(self.args, reading=True):
                    batch = read_micro_batch(
                        iterator,
                        args=self.args,
                        vp_stage=get_attr_wrapped_model(chunk, "vp_stage"),
                        micro_batch_size=micro_batch_size,
                        forget=index < forget_count,
                    )
                batches[-1].append(batch)
        return batches

    def _attach_context(
        self, batches: list[MicroBatch], forget_count: int, hidden: list[torch.Tensor]
    ) -> None:
        """Count the tokens of each role over the global batch and give every microbatch its context."""
        masks = torch.stack([batch.loss_mask for batch in batches if batch.loss_mask is not None])
        tokens = torch.stack(((-masks).clamp(min=0).sum(), masks.clamp(min=0).sum())).double()
        torch.distributed.all_reduce(tokens, group=self._data_group())
        scale = float(len(batches) * self.args.data_parallel_size)
        for index, batch in enumerate(batches):
            batch.context = StepContext(tokens=tokens, scale=scale)
            if hidden and index >= forget_count:
                batch.context.reference_hidden = hidden[index - forget_count]

    def _metrics(
        self, reports: list[dict[str, torch.Tensor]], tokens: torch.Tensor, forward_only: bool
    ) -> dict[str, torch.Tensor]:
        """Reduce the microbatches' sums over microbatches and data-parallel ranks."""
        sums = torch.stack([report["sums"] for report in reports]).sum(dim=0)
        group = self._data_group()
        torch.distributed.all_reduce(sums, group=group)
        if not forward_only:
            metrics = self.objective.metrics(sums, tokens)
            self.watch.observe(metrics, tokens)
            return metrics
        # evaluate() sums what it is given over the data-parallel ranks, and then over batches.
        fractions = self.objective.fractions(sums, tokens)
        return {name: fraction / group.size() for name, fraction in fractions.items()}

    @staticmethod
    def _data_group() -> torch.distributed.ProcessGroup:
        return parallel_state.get_data_parallel_group(with_context_parallel=True)
