"""The composition of a global batch: which samples are forgotten and which are replayed.

Of each global batch of ``G`` samples the first ``F`` come from the forget blend, the rest from the
replay blend. The order is a function of the sample's index alone, so it survives a change of the
parallel layout on resume. The role of a token is the sign of ``loss_mask``: +1 learn, -1 forget,
0 ignore; Megatron already broadcasts that tensor and slices it for context parallelism.
"""

from __future__ import annotations

from collections.abc import Mapping, Sized
from typing import Any, Protocol

import torch
from torch.utils.data import Dataset

from megatron_ext.exceptions import DataError


class SampleDataset(Sized, Protocol):
    """What Megatron's GPT datasets offer: samples by index, all of one split."""

    def __getitem__(self, index: int) -> Mapping[str, torch.Tensor]: ...


class ComposedDataset(Dataset):
    """Forget and replay samples in the fixed order of the global batches.

    Args:
        forget: dataset of the text to forget.
        replay: dataset of the text to replay.
        forget_samples: ``F``, forgotten samples of each global batch.
        global_batch_size: ``G``, samples of each global batch.
        split: Megatron's split; its loader chooses batch sizes by it.

    Raises:
        DataError: one of the datasets cannot fill a single batch.
    """

    def __init__(
        self,
        forget: SampleDataset,
        replay: SampleDataset,
        *,
        forget_samples: int,
        global_batch_size: int,
        split: Any,
    ) -> None:
        assert 0 < forget_samples < global_batch_size
        self.forget = forget
        self.replay = replay
        self.forget_samples = forget_samples
        self.global_batch_size = global_batch_size
        self.split = split
        replay_samples = global_batch_size - forget_samples
        self.batches = min(len(forget) // forget_samples, len(replay) // replay_samples)
        if self.batches == 0:
            raise DataError(
                f"{split}: expected at least {forget_samples} forget and {replay_samples} replay samples, "
                f"found {len(forget)} and {len(replay)}"
            )

    def __len__(self) -> int:
        return self.batches * self.global_batch_size

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """The sample at a position of the run.

        Args:
            index: batch number times ``G`` plus the position inside the batch.

        Returns:
            Megatron's sample, with ``loss_mask`` ``[s]`` negated where it is forgotten.
        """
        batch, position = divmod(int(index), self.global_batch_size)
        if position < self.forget_samples:
            sample = dict(self.forget[batch * self.forget_samples + position])
            sample["loss_mask"] = -sample["loss_mask"]
            return sample
        replay_samples = self.global_batch_size - self.forget_samples
        return dict(self.replay[batch * replay_samples + position - self.forget_samples])
