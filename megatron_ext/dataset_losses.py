"""The losses of each dataset of the blends apart, over the steps between two logs and over a validation.

The mean over a blend hides that one of its datasets gets worse. Samples know their dataset, and the head
gives the terms of every token, so nothing is computed but sums; ranks add theirs up once for each log.
"""

from __future__ import annotations

from argparse import Namespace
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from megatron.core import parallel_state
from megatron.training import get_tensorboard_writer, get_wandb_writer
from megatron.training.utils import get_blend_and_blend_per_split

from megatron_ext.checkpoint.named import short_names
from megatron_ext.data.batch import MicroBatch
from megatron_ext.data.providers import Blend, prefixes

# Microbatches whose sums wait for being added up: each is a few numbers, and adding them a launch or two.
_WAITING = 64


@dataclass
class _Sums:
    """Sums over the tokens of each dataset.

    Attributes:
        total: fp64 ``[rows, width + 1]``; the last column counts tokens.
        rows: of each sample that waits to be added.
        waiting: fp64 ``[width + 1, b]`` of each microbatch that waits.
    """

    total: torch.Tensor
    rows: list[int] = field(default_factory=list)
    waiting: list[torch.Tensor] = field(default_factory=list)

    def add(self, rows: Sequence[int], sums: torch.Tensor) -> None:
        self.rows += rows
        self.waiting.append(sums)
        if len(self.waiting) == _WAITING:
            self.fold()

    def fold(self) -> torch.Tensor:
        """Add up what waits; the totals."""
        if self.waiting:
            index = torch.tensor(self.rows)
            if self.total.is_cuda:  # by way of pinned memory, so that nobody waits for the GPU
                index = index.pin_memory().to(self.total.device, non_blocking=True)
            self.total.index_add_(0, index, torch.cat(self.waiting, dim=1).T)
            self.rows, self.waiting = [], []
        return self.total


class Terms(Protocol):
    """What a kind of training makes of the terms of tokens.

    Attributes:
        width: how many sums.
        told: names of the means that the console has; TensorBoard has them all.
    """

    width: int
    told: tuple[str, ...]

    def sums(self, terms: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """``[width, ...]`` of terms ``[n, ..., s]`` and a mask ``[..., s]``, over the tokens that count."""
        ...

    def of_dataset(self, sums: Sequence[float], tokens: float, forgotten: bool) -> dict[str, float]:
        """Means by name, of the sums over a dataset's tokens; ``forgotten`` is its role."""
        ...


class DatasetLosses:
    """Collects the sums of every sample by its dataset, and logs their means.

    Args:
        args: Megatron's validated arguments.
        terms: makes sums and means.
        forget: the blend that is forgotten, over all splits or for each; ``--data-path`` is learnt.
    """

    def __init__(
        self,
        args: Namespace,
        terms: Terms,
        forget: tuple[Blend, list[Blend] | None] = (None, None),
    ) -> None:
        self.args = args
        self.terms = terms
        learnt = prefixes(*get_blend_and_blend_per_split(args))
        forgotten = prefixes(*forget)
        # One that is both forgotten and replayed has two rows.
        sides = [*((path, False) for path in learnt), *((path, True) for path in forgotten)]
        self._rows = {side: row for row, side in enumerate(sides)}
        paths = list(dict.fromkeys(path for path, _ in sides))
        self._names = dict(zip(paths, short_names(paths), strict=True))
        self._sums: dict[bool, _Sums] = {}

    def install(self) -> None:
        """Join Megatron's loop where it has logged a step, and a validation."""
        import megatron.training.training as loop

        decide, evaluate = loop.checkpoint_and_decide_exit, loop.evaluate_and_print_results

        def log_and_decide(
            model: Any, optimizer: Any, scheduler: Any, iteration: int, *more: Any
        ) -> Any:
            if iteration % self.args.dataset_log_interval == 0:
                self.log(iteration, training=True)
            return decide(model, optimizer, scheduler, iteration, *more)

        def evaluate_and_log(
            prefix: str,
            step: Any,
            iterator: Any,
            model: Any,
            iteration: int,
            *more: Any,
            **named: Any,
        ) -> Any:
            result = evaluate(prefix, step, iterator, model, iteration, *more, **named)
            kind = " test" if prefix.endswith("test set") else " validation"
            self.log(iteration, training=False, kind=kind)
            return result

        loop.checkpoint_and_decide_exit = log_and_decide
        loop.evaluate_and_print_results = evaluate_and_log

    def add(self, batch: MicroBatch, terms: torch.Tensor, *, training: bool) -> None:
        """Take over a microbatch; called on the last pipeline stage.

        Args:
            batch: the microbatch. On a tensor-parallel rank that has it from another, which has the same
                sums, nothing happens.
            terms: ``[n, s * b]``, of every token in the order of the head.
            training: whether this is a step, or else validation.
        """
        if batch.datasets is None:
            return
        assert batch.loss_mask is not None
        rows = [self._rows[path, batch.forget is True] for path in batch.datasets]
        sums = self.terms.sums(by_sample(terms.detach(), batch.loss_mask), batch.loss_mask)
        tokens = batch.loss_mask.abs().sum(dim=1)
        self._of(training).add(rows, torch.cat((sums, tokens[None])).double())

    def log(self, iteration: int, *, training: bool, kind: str = "") -> None:
        """Write the means since the last log to TensorBoard, W&B and the console, and begin anew.

        All ranks call it; those of the last pipeline stage take part.

        Args:
            iteration: the steps that are done.
            training: of steps, or else of validation.
            kind: stands behind the names of the means.
        """
        if not parallel_state.is_pipeline_last_stage(ignore_virtual=True):
            return
        total = self._of(training).fold()
        data_group = parallel_state.get_data_parallel_group(with_context_parallel=True)
        torch.distributed.all_reduce(total, group=data_group)
        # To the ranks that read no data, of which the last one of all logs.
        torch.distributed.broadcast(
            total,
            src=parallel_state.get_tensor_model_parallel_src_rank(),
            group=parallel_state.get_tensor_model_parallel_group(),
        )
        if torch.distributed.get_rank() == torch.distributed.get_world_size() - 1:
            self._write(total.tolist(), iteration, kind)
        total.zero_()

    def _write(self, totals: list[list[float]], iteration: int, kind: str) -> None:
        found: dict[str, dict[str, float]] = defaultdict(dict)
        for (path, forgotten), (*sums, tokens) in zip(self._rows, totals, strict=True):
            if tokens:  # else none of its samples was drawn
                for name, mean in self.terms.of_dataset(sums, tokens, forgotten).items():
                    found[f"{name}{kind}"][self._names[path]] = mean
        tags = {f"{name}/{of}": mean for name, means in found.items() for of, mean in means.items()}
        if writer := get_tensorboard_writer():
            for tag, mean in tags.items():
                writer.add_scalar(tag, mean, iteration)
        if wandb := get_wandb_writer():
            wandb.log(tags, iteration)
        for name in self.terms.told:
            if means := found[f"{name}{kind}"]:
                listed = " | ".join(f"{of}: {mean:.6E}" for of, mean in means.items())
                print(f" {name}{kind} by dataset at iteration {iteration} | {listed} |", flush=True)

    def _of(self, training: bool) -> _Sums:
        if training not in self._sums:
            shape = len(self._rows), self.terms.width + 1
            device = torch.cuda.current_device()
            self._sums[training] = _Sums(torch.zeros(shape, dtype=torch.float64, device=device))
        return self._sums[training]


def by_sample(terms: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Terms in the order of the head, ``[n, s * b]``, by sample, ``[n, b, s]``; ``mask`` is ``[b, s]``."""
    samples, tokens = mask.shape
    return terms.unflatten(1, (tokens, samples)).transpose(1, 2)
