"""Generation by the distributed model: tensor, pipeline and data parallelism, with a key-value cache.

Megatron's cache (`StaticInferenceContext`) and its own forward-only schedule, with one token of every
request a step. Its dynamic engine needs flash-attn, and its static one, which is deprecated, sends whole
rows of logits between pipeline stages; here they send one token a request.

Prompts of different lengths need no padding inside a sequence: the model reads all prompts of a batch up
to the end of the shortest, and from there one position a step; a longer prompt reads its own tokens until
it ends. Batches are made of prompts of similar length.
"""

from __future__ import annotations

import functools
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.inference.contexts import StaticInferenceContext
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from megatron_ext.evaluation.sampling import Chooser, Request, Scored
from megatron_ext.evaluation.scoring import label_scores, rows_to_score, sum_scores
from megatron_ext.frozen import FrozenModel
from megatron_ext.replicas import over_replicas

# From hidden states `[s, b, H]` to logits `[s, b, V]` of the whole vocabulary.
Projection = Callable[[Tensor], Tensor]
# Positions whose logits are held at a time when texts are scored.
_POSITIONS = 64


class MegatronGenerator:
    """Continues prompts with a model that is spread over the ranks.

    Args:
        model: the model's chunks on this rank.
        args: Megatron's validated arguments: micro-batch size, positions, vocabulary.
    """

    def __init__(self, model: FrozenModel, *, args: Namespace) -> None:
        assert len(model.chunks) == 1, "generation needs a layout without virtual pipeline stages"
        self._chunk = model.chunks[0]
        self._rows: int = args.micro_batch_size
        self._vocab_size: int = args.unpadded_vocab_size
        self.context_length: int = args.max_position_embeddings
        self.identity = model.digest
        self.is_writer = torch.distributed.get_rank() == 0
        # As many microbatches at a time as there are stages, so that none of them waits.
        stages = parallel_state.get_pipeline_model_parallel_world_size()
        ranks = parallel_state.get_data_parallel_world_size()
        self.batch_size = self._rows * stages * ranks

    def agree(self, value: Any) -> Any:
        """The writer's value on every rank."""
        values = [value]
        torch.distributed.broadcast_object_list(values, src=0)
        return values[0]

    @torch.no_grad()
    def complete(self, requests: Sequence[Request]) -> list[list[int]]:
        """Continue up to `batch_size` prompts, the same on every rank.

        Args:
            requests: prompts that leave room for a token in `context_length`.

        Returns:
            The new tokens of each, on every rank.
        """
        return over_replicas(requests, self._complete)

    def _complete(self, requests: Sequence[Request]) -> Iterator[list[int]]:
        """Continue prompts on this model replica."""
        batches = -(-len(requests) // self._rows)
        padded = [*requests, *[requests[-1]] * (batches * self._rows - len(requests))]
        lengths = [len(request.tokens) for request in padded]
        limits = [
            min(length + request.sampling.max_new_tokens, self.context_length)
            for length, request in zip(lengths, padded, strict=True)
        ]
        tokens = torch.zeros(len(padded), max(limits), dtype=torch.int64)
        for row, request in enumerate(padded):
            tokens[row, : lengths[row]] = torch.tensor(request.tokens)
        ends = list(limits)
        choose = Chooser(padded, vocab_size=self._vocab_size)
        contexts = [StaticInferenceContext(self._rows, max(limits)) for _ in range(batches)]
        start = 0
        for end in range(min(lengths), max(limits)):
            wanted = [row for row in range(len(padded)) if lengths[row] <= end < ends[row]]
            logits = self._forward(tokens[:, start:end], start, contexts)
            chosen = None if logits is None else choose(logits, rows=wanted)
            column = _from_last_stage(chosen, shape=(len(padded),)).cpu()
            tokens[wanted, end] = column[wanted]
            for row in wanted:
                if padded[row].is_finished(tokens[row, lengths[row] : end + 1].tolist()):
                    ends[row] = end + 1
            if all(stop <= end + 1 for stop in ends):
                break
            start = end
        for row in range(len(requests)):
            yield tokens[row, lengths[row] : ends[row]].tolist()

    @torch.no_grad()
    def score(self, sequences: Sequence[Scored]) -> list[tuple[float, bool]]:
        """Log-probabilities of up to `batch_size` sequences, the same on every rank.

        Args:
            sequences: of at most `context_length` + 1 tokens.

        Returns:
            For each the sum over its tokens from `start` on, in nats, and whether each of them is the most
            probable one.
        """
        return over_replicas(sequences, self._score)

    def _score(self, sequences: Sequence[Scored]) -> list[tuple[float, bool]]:
        """Score sequences on this model replica."""
        rows = -(-len(sequences) // self._rows) * self._rows
        tokens, counts = rows_to_score(sequences, rows=rows)
        labels = iter(tokens[:, 1:].split(self._rows))

        def token_scores(hidden: Tensor, project: Projection) -> Tensor:
            wanted = next(labels).to(hidden.device).transpose(0, 1)
            parts = zip(hidden.split(_POSITIONS), wanted.split(_POSITIONS), strict=True)
            found = [
                label_scores(project(part)[..., : self._vocab_size], own) for part, own in parts
            ]
            return torch.cat(found).transpose(0, 1)

        contexts = [None] * (rows // self._rows)
        found = self._run(tokens[:, :-1], 0, contexts, token_scores)
        scores = _from_last_stage(found, shape=(*counts.shape, 2), dtype=torch.float64).cpu()
        return sum_scores(scores, counts)[: len(sequences)]

    def _forward(
        self, tokens: Tensor, start: int, contexts: Sequence[StaticInferenceContext]
    ) -> Tensor | None:
        """Logits `[rows, V]` of the token that follows, on the last stage; `None` elsewhere."""

        def last_logits(hidden: Tensor, project: Projection) -> Tensor:
            return project(hidden[-1:])[0]

        return self._run(tokens, start, contexts, last_logits)

    def _run(
        self,
        tokens: Tensor,
        start: int,
        contexts: Sequence[StaticInferenceContext | None],
        process: Callable[[Tensor, Projection], Tensor],
    ) -> Tensor | None:
        """Run some positions of all microbatches.

        Args:
            tokens: int64 `[rows, s]`, those positions.
            start: the first of them.
            contexts: cache of each microbatch, or `None`.
            process: from final hidden states `[s, b, H]` of a microbatch, and what makes whole logits of
                some of them, to a result whose first dimension is its rows.

        Returns:
            On the last stage the results of all rows, `None` elsewhere.
        """
        device = torch.cuda.current_device()
        parts = iter(tokens.to(device).split(self._rows))
        length = tokens.shape[1]
        positions = torch.arange(start, start + length, device=device).expand(self._rows, -1)
        caches = iter(contexts)
        output = functools.partial(_process_output, process)

        def forward_step(_: Any, model: Any) -> tuple[Any, Any]:
            context = next(caches)
            if context is not None:
                context.sequence_len_offset = start
            found = model(
                next(parts), positions, None, inference_context=context, output_processor=output
            )
            return found, lambda output_tensor, non_loss_data: output_tensor

        outputs = get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=None,
            model=[self._chunk],
            num_microbatches=len(contexts),
            seq_length=length,
            micro_batch_size=self._rows,
            forward_only=True,
            collect_non_loss_data=True,
        )
        return torch.cat(outputs) if outputs else None


def _process_output(
    process: Callable[[Tensor, Projection], Tensor],
    hidden_states: Tensor,
    output_layer: Any,
    output_weight: Tensor | None,
    **_: Any,
) -> Tensor:
    """What Megatron calls with the final hidden states, in place of its output layer."""

    def project(hidden: Tensor) -> Tensor:
        logits: Tensor = output_layer(hidden, weight=output_weight, runtime_gather_output=True)[0]
        return logits

    return process(hidden_states, project)


def _from_last_stage(
    found: Tensor | None, *, shape: tuple[int, ...], dtype: torch.dtype = torch.int64
) -> Tensor:
    """What the last pipeline stage found, on all stages."""
    if found is None:
        found = torch.empty(shape, dtype=dtype, device=torch.cuda.current_device())
    if parallel_state.get_pipeline_model_parallel_world_size() > 1:
        found = found.to(dtype).contiguous()
        torch.distributed.broadcast(
            found,
            src=parallel_state.get_pipeline_model_parallel_last_rank(),
            group=parallel_state.get_pipeline_model_parallel_group(),
        )
    return found
