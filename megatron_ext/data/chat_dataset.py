"""Conversations packed to the context length, as Megatron's training samples.

What a sample holds is a function of its index, the tokens and the seed alone: a resumed run, on any
number of ranks, goes on where it stopped. In a sequence the positions run on from one conversation to
the next and attention is causal over all of it, as in pre-training on packed documents, unless samples say
where each conversation begins.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset

from megatron_ext.data.chat_tokens import ChatTokens

# Sequences that are being filled at a time. Log-normal lengths with a mean of 556 fill 98.8% of a context of
# 4096 with 16, 98.6% with 8 and 98.9% with 64; 7 s a million conversations (2-core CPU).
WINDOW = 16


def pack(
    lengths: NDArray[np.int64], order: NDArray[np.int64], *, capacity: int, window: int = WINDOW
) -> list[list[int]]:
    """Put whole conversations into sequences: each into the first open one with room for it.

    Args:
        lengths: tokens of each conversation, at most ``capacity``.
        order: the conversations in the order in which they are put.
        capacity: tokens of a sequence.
        window: sequences open at a time; where all are and none has room, the fullest is closed.

    Returns:
        The conversations of each sequence.
    """
    room = np.full(window, -1, dtype=np.int64)  # -1: not open
    slots: list[list[int]] = [[] for _ in range(window)]
    closed: list[list[int]] = []
    used = 0
    for index in order.tolist():
        length = int(lengths[index])
        slot = int(np.argmax(room >= length))
        if room[slot] < length:
            if used < window:
                slot = used
                used += 1
            else:
                slot = int(np.argmin(room))
                closed.append(slots[slot])
            slots[slot] = []
            room[slot] = capacity
        slots[slot].append(index)
        room[slot] -= length
    return closed + slots[:used]


class Packing:
    """The sequences of epoch after epoch; every epoch has all conversations, once, in an order of its own.

    Args:
        tokens: the conversations.
        seq_length: tokens that the model sees of a sequence; one more is there as the last label.
        seed: of the orders.
    """

    def __init__(self, tokens: ChatTokens, *, seq_length: int, seed: int) -> None:
        self.tokens = tokens
        self.seq_length = seq_length
        self.seed = seed
        self._epochs: list[list[list[int]]] = []
        self._ends: list[int] = []

    def sequences(self, epochs: int) -> int:
        """Number of sequences of the first epochs."""
        while len(self._epochs) < epochs:
            self._add_epoch()
        return self._ends[epochs - 1] if epochs else 0

    def conversations(self, index: int) -> list[int]:
        """The conversations of a sequence, counted from the first of the first epoch."""
        epoch = 0
        while index >= self.sequences(epoch + 1):
            epoch += 1
        return self._epochs[epoch][index - self.sequences(epoch)]

    def sequence(self, index: int) -> tuple[NDArray[np.int32], NDArray[np.uint8]]:
        """Tokens and mask of a sequence, at most ``seq_length + 1``."""
        bounds = self.tokens.bounds
        parts = [slice(bounds[i], bounds[i + 1]) for i in self.conversations(index)]
        return (
            np.concatenate([self.tokens.ids[part] for part in parts]),
            np.concatenate([self.tokens.mask[part] for part in parts]),
        )

    def ends(self, index: int) -> torch.Tensor:
        """Where the conversations of a sequence end in it, int64."""
        return torch.from_numpy(self.tokens.lengths[self.conversations(index)].cumsum())

    @cached_property
    def fill(self) -> float:
        """Part of the first epoch's places that hold tokens."""
        return len(self.tokens.ids) / (self.sequences(1) * (self.seq_length + 1))

    def _add_epoch(self) -> None:
        # RandomState, for its streams are frozen: a newer numpy resumes a run in the same order.
        random = np.random.RandomState([self.seed, len(self._epochs)])
        lengths = self.tokens.lengths
        packed = pack(lengths, random.permutation(len(lengths)), capacity=self.seq_length + 1)
        # Sequences that were left open are less full: shuffled, they are no batches of their own.
        self._epochs.append([packed[i] for i in random.permutation(len(packed))])
        self._ends.append(len(packed) + (self._ends[-1] if self._ends else 0))


class ChatDataset(Dataset):
    """Megatron's samples of packed conversations.

    Args:
        packing: the sequences.
        samples: number of samples that the run asks for; epochs follow one another as needed.
        eod: token that fills a sequence up; it is never a label that counts.
        split: Megatron's split; its loader chooses batch sizes by it.
        apart: whether attention is within conversations, so that samples say where each begins.
    """

    def __init__(
        self, packing: Packing, *, samples: int, eod: int, split: Any, apart: bool = False
    ) -> None:
        self.packing = packing
        self.samples = samples
        self.eod = eod
        self.split = split
        self.apart = apart

    def __len__(self) -> int:
        return self.samples

    def __getitem__(self, index: int) -> dict[str, Any]:
        """The sample at a position of the run, with the keys of Megatron's GPT dataset.

        Returns:
            ``tokens``, ``labels`` and ``position_ids``, int64 ``[s]``, and ``loss_mask``, fp32 ``[s]``, 1
            where the label is one that the assistant writes; and ``source``, what the sample holds. With
            conversations apart also ``cu_seqlens``, int32 ``[s + 1]``, and positions that begin with each.
        """
        ids, mask = self.packing.sequence(int(index))
        length = self.packing.seq_length
        tokens = torch.full((length + 1,), self.eod, dtype=torch.int64)
        counts = torch.zeros(length + 1, dtype=torch.float32)
        tokens[: len(ids)] = torch.from_numpy(ids.astype(np.int64))
        counts[: len(mask)] = torch.from_numpy(mask.astype(np.float32))
        sample: dict[str, Any] = {
            "tokens": tokens[:-1].contiguous(),
            "labels": tokens[1:].contiguous(),
            "loss_mask": counts[1:].contiguous(),
            "position_ids": torch.arange(length, dtype=torch.int64),
            "source": f"sequence {index} (conversations {self.packing.conversations(int(index))})",
        }
        if self.apart:
            # What fills the sequence up is attended to by itself.
            ends = self.packing.ends(int(index)).clip(max=length).unique()
            begins = torch.zeros(length, dtype=torch.int64)
            begins[ends[ends < length]] = ends[ends < length]
            sample["position_ids"] -= begins.cummax(dim=0).values
            lengths = torch.full((length + 1,), length, dtype=torch.int32)
            lengths[0], lengths[1 : len(ends) + 1] = 0, ends
            sample["cu_seqlens"] = lengths
        return sample
