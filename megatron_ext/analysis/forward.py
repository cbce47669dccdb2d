"""Final hidden states and embeddings of samples, by the distributed model.

Legend: N samples, s tokens of a sequence, b sequences of a microbatch, H hidden size.
"""

from __future__ import annotations

import math
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
import torch
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from tqdm import tqdm

from megatron_ext.data.batch import MicroBatch
from megatron_ext.frozen import FrozenModel
from megatron_ext.replicas import over_replicas

# Sequences are padded to a multiple of it, in tokens: few lengths, and none that a kernel would fill up.
_STEP = 64


def in_order_of_length[Result](
    samples: Sequence[np.ndarray], work: Callable[[Sequence[np.ndarray]], Iterable[Result]]
) -> list[Result]:
    """Each model replica's share of the samples, the longest first, so that microbatches hold little padding.

    Args:
        samples: token arrays; the same on every rank.
        work: makes a result, which can be pickled, of each sample of a share, in order.

    Returns:
        A result for each sample, in the order of the samples; on a pipeline stage what `work` made there.
    """
    order = sorted(range(len(samples)), key=lambda i: -len(samples[i]))
    results = over_replicas([samples[i] for i in order], work)
    found = dict(zip(order, results, strict=True))
    return [found[i] for i in range(len(samples))]


def final_states(
    model: FrozenModel,
    samples: Sequence[np.ndarray],
    *,
    args: Namespace,
    eod: int,
    starts: Sequence[int] | None = None,
    micro_batches: int = 4,
) -> Iterator[tuple[MicroBatch, torch.Tensor]]:
    """Run samples through the model, each preceded by an end-of-document token as in training.

    Every rank of the model's replica must take all of it.

    Args:
        model: the model's chunks on this rank.
        samples: int64 token arrays of at most ``args.seq_length`` tokens; the same on every rank of the
            replica.
        args: Megatron's arguments: sequence length, micro-batch size.
        eod: id of the end-of-document token.
        starts: where the text of each sample begins, of `text_starts`; by default at its first token.
        micro_batches: microbatches that a pass through the pipeline takes at a time, all as long as the
            longest of their samples.

    Yields:
        On the last pipeline stage each microbatch with its final hidden states ``[s, b, H]``, behind the
        final normalisation: what the output layer reads. The loss mask is 1 where the label is of the
        text. Rows beyond the samples are padding alone, with a mask of 0. Nothing on other stages.
    """
    starts = starts or [0] * len(samples)
    step = args.micro_batch_size * micro_batches
    # On a terminal alone: in a file each redrawing would be another line.
    quiet = True if torch.distributed.get_rank() != 0 else None
    with tqdm(total=len(samples), unit="sample", disable=quiet, leave=False) as bar:
        for start in range(0, len(samples), step):
            group = samples[start : start + step]
            begins = starts[start : start + step]
            length = _padded_length(max(map(len, group)), args)
            batches = list(
                _micro_batches(group, begins, args.micro_batch_size, length=length, eod=eod)
            )
            hidden = model.hidden_states(
                get_forward_backward_func(),
                [batches] * len(model.chunks),
                seq_length=length,
                micro_batch_size=args.micro_batch_size,
            )
            yield from zip(batches, hidden, strict=bool(hidden))
            bar.update(len(group))


def text_starts(samples: Sequence[np.ndarray], *, bos: int | None) -> list[int]:
    """Where the text of each sample begins: at 1 if a tokenizer has begun it with a token of its own.

    What a model thinks of that token behind the end of another document says nothing of the text, and
    lm-evaluation-harness leaves it out as well. A sample that is nothing else is taken as it is.

    Args:
        samples: token arrays.
        bos: id of the token that begins texts; ``None`` if the tokenizer has none.
    """
    return [int(len(sample) > 1 and int(sample[0]) == bos) for sample in samples]


def embed_samples(
    model: FrozenModel,
    samples: Sequence[np.ndarray],
    *,
    args: Namespace,
    eod: int,
    bos: int | None = None,
) -> np.ndarray | None:
    """Mean of the final hidden states over the tokens of each sample, a token that begins it left out.

    Every replica of the model takes its share of the samples.

    arXiv 2406.12397 embeds text by the last hidden state and does not say how a text's states become one
    vector. With the mean, every token counts, and the vector does not hang on how a text happens to end or
    where it was cut, as the last token's would.

    Args:
        model: the model's chunks on this rank.
        samples: int64 arrays of at most ``args.seq_length - 1`` tokens; the same on every rank.
        args: Megatron's arguments.
        eod: id of the end-of-document token.
        bos: id of the token that begins texts, if the tokenizer has one.

    Returns:
        fp32 ``[N, H]`` on the last pipeline stage, ``None`` elsewhere.
    """

    def embed(mine: Sequence[np.ndarray]) -> list[np.ndarray | None]:
        # One token more, so that the state of a sample's last token is computed as well.
        extended = [np.append(sample, eod) for sample in mine]
        starts = text_starts(mine, bos=bos)
        states = final_states(model, extended, args=args, eod=eod, starts=starts)
        found = [_mean_states(batch, hidden) for batch, hidden in states]
        return [*torch.cat(found)[: len(mine)].numpy()] if found else [None] * len(mine)

    rows = in_order_of_length(samples, embed)
    if not parallel_state.is_pipeline_last_stage(ignore_virtual=True):
        return None
    return np.stack([row for row in rows if row is not None])


def _mean_states(batch: MicroBatch, states: torch.Tensor) -> torch.Tensor:
    """Mean state of each sequence's text, fp32 ``[b, H]`` on the CPU."""
    assert batch.loss_mask is not None
    mask = batch.loss_mask.double().transpose(0, 1)
    # A state is that of the token before its label. In front there is the end-of-document token, which all
    # samples share, and then perhaps the one that begins texts, whose own label does not count.
    mask[1] *= mask[0]
    mask[0] = 0
    total = (states.double() * mask[..., None]).sum(dim=0)
    return (total / mask.sum(dim=0).clamp(min=1)[:, None]).float().cpu()


def _padded_length(tokens: int, args: Namespace) -> int:
    """Tokens of a sequence that holds so many, and that sequence parallelism can split."""
    step = math.lcm(_STEP, args.tensor_model_parallel_size)
    return min(-(-tokens // step) * step, args.seq_length)


def _micro_batches(
    samples: Sequence[np.ndarray], starts: Sequence[int], size: int, *, length: int, eod: int
) -> Iterator[MicroBatch]:
    """Right-padded microbatches of ``size`` rows; rows beyond the samples are padding alone."""
    device = torch.cuda.current_device()
    position_ids = torch.arange(length, device=device).expand(size, length)
    for start in range(0, len(samples), size):
        tokens = torch.full((size, length), eod, dtype=torch.int64)
        labels = torch.full((size, length), eod, dtype=torch.int64)
        mask = torch.zeros((size, length))
        for row, sample in enumerate(samples[start : start + size]):
            labels[row, : len(sample)] = torch.from_numpy(sample)
            tokens[row, 1 : len(sample)] = labels[row, : len(sample) - 1]
            mask[row, starts[start + row] : len(sample)] = 1
        yield MicroBatch(
            tokens=tokens.to(device),
            labels=labels.to(device),
            loss_mask=mask.to(device),
            position_ids=position_ids,
        )
