"""Which samples of which data set a run has consumed, counted in the index that it read them from.

Megatron's sampler hands out the samples of the training set in order, on any layout, and a checkpoint says
how many were consumed. What is missing to count them is the index that says which data set each one
came from, and it changes when a run goes on with other flags. So each start adds to the arguments, and
with them to every checkpoint, from which sample on which index is read (`args.consumed_data`).
"""

from __future__ import annotations

import hashlib
import logging
from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core.datasets.blended_dataset import BlendedDataset
from numpy.typing import NDArray

from megatron_ext.data.composition import ComposedDataset
from megatron_ext.data.index_cache import blend_index_file
from megatron_ext.exceptions import DataError

logger = logging.getLogger(__name__)

# Samples that are counted at a time: 128 MiB of the index.
_CHUNK = 1 << 26
# Samples of a data set that tell its order from another: two of very many.
_PROBES = 2

Blend = dict[str, Any]


def record_start(args: Namespace, train: Any, *, forget_samples: int) -> None:
    """Add to the arguments what the training samples are read from, from this start on.

    Called on all ranks, once the checkpoint is loaded and the datasets are built. A run that goes on in
    another order than before is told so: its place is a number of samples, whichever these are.

    Args:
        args: Megatron's validated arguments; what the run so far has recorded is in them.
        train: the training set; rank 0 has it.
        forget_samples: ``F``, forgotten samples of each global batch; 0 for plain training.
    """
    history, args.consumed_data = args.consumed_data or [], None
    # Of these the order of the samples is another one.
    if (
        args.skip_train
        or args.mock_data
        or args.phase_transition_iterations
        or args.dataloader_type != "single"
    ):
        return
    parts: list[Any] = [None]
    if torch.distributed.get_rank() == 0:
        assert train is not None
        part = {
            "start": args.consumed_train_samples,
            "batch": args.global_batch_size,
            "forget": forget_samples,
            "roles": _roles(train),
        }
        _compare_order(history, part)
        parts = [_append(history, part)]
    # The arguments of a checkpoint must be the same on all ranks.
    torch.distributed.broadcast_object_list(parts, src=0)
    args.consumed_data = parts[0]


def _roles(train: Any) -> dict[str, Blend]:
    if isinstance(train, ComposedDataset):
        return {"forget": _describe(train.forget), "replay": _describe(train.replay)}
    return {"learn": _describe(train)}


def _describe(dataset: Any) -> Blend:
    """What it takes to tell the data set of each sample."""
    if not isinstance(dataset, BlendedDataset):
        return {
            **{"datasets": [str(dataset.dataset_path)], "weights": [1.0], "size": len(dataset)},
            "order": [_order(dataset)],
        }
    file = blend_index_file(dataset)
    return {
        "order": [_order(part) for part in dataset.datasets],
        "datasets": [str(part.dataset_path) for part in dataset.datasets],
        "weights": list(dataset.weights),
        "size": dataset.size,
        "index": None if file is None else str(file.resolve()),
    }


def _order(dataset: Any) -> str:
    """Digest of the first samples' tokens: of the text, its split, the seed, the length and the epochs."""
    digest = hashlib.sha256()
    for index in range(min(_PROBES, len(dataset))):
        digest.update(dataset[index]["tokens"].numpy().tobytes())
    return digest.hexdigest()[:12]


def _compare_order(history: list[dict[str, Any]], part: dict[str, Any]) -> None:
    """Say where the samples come in another order than those that were consumed."""
    before = [other for other in history if other["start"] < part["start"]]
    for role, blend in part["roles"].items() if before else ():
        old = before[-1]["roles"].get(role, {})
        # Checkpoints of earlier versions do not say.
        if "order" in old and any(old[key] != blend[key] for key in ("order", "weights")):
            logger.warning(
                "from sample %d on, the samples to %s come from other data or in another order than those "
                "before, because data, weights, --split, --seed, --seq-length or the number of epochs "
                "changed: some samples may be read twice and others never",
                part["start"],
                role,
            )


def _append(history: list[dict[str, Any]], part: dict[str, Any]) -> list[dict[str, Any]]:
    """A start that reads on in the same index adds nothing."""
    parts = [before for before in history if before["start"] < part["start"]]
    if parts and {**parts[-1], "start": 0} == {**part, "start": 0}:
        return parts
    return [*parts, part]


@dataclass(frozen=True)
class Consumed:
    """What a run has consumed of one data set in one role.

    Attributes:
        role: ``learn``, ``forget`` or ``replay``.
        prefix: the data set.
        samples: number of its samples that were consumed.
        expected: number that the weights ask for.
    """

    role: str
    prefix: str
    samples: int
    expected: float


@dataclass(frozen=True)
class Count:
    """All that a run has consumed.

    Attributes:
        tokens_per_sample: every training sample is full.
        unrecorded: samples that were consumed before the first record.
        datasets: in the order of the flags.
    """

    tokens_per_sample: int
    unrecorded: int
    datasets: list[Consumed]


def count(saved: Namespace, *, path: Path) -> Count:
    """Count what a run has consumed up to a checkpoint.

    Args:
        saved: the arguments that the checkpoint has recorded.
        path: the checkpoint, for messages.

    Raises:
        DataError: the checkpoint does not say what was read, or its index is not that of the record.
    """
    parts = getattr(saved, "consumed_data", None)
    consumed = saved.consumed_train_samples
    if not parts:
        raise DataError(
            f"{path}: expected a record of the data that were read, found none: it is of "
            "another program or version, of chat tuning, or its samples were drawn at random"
        )
    samples: dict[tuple[str, str], int] = {}
    expected: dict[tuple[str, str], float] = {}
    ends = [part["start"] for part in parts[1:]] + [consumed]
    for part, end in zip(parts, ends, strict=True):
        for role, blend in part["roles"].items():
            first, last = (_of_role(part, role, place) for place in (part["start"], end))
            found = _count_blend(blend, first, last)
            weights = np.asarray(blend["weights"], dtype=np.float64)
            wanted = weights / weights.sum() * (last - first)
            for prefix, number, share in zip(blend["datasets"], found, wanted, strict=True):
                key = (role, prefix)
                samples[key] = samples.get(key, 0) + int(number)
                expected[key] = expected.get(key, 0.0) + float(share)
    datasets = [Consumed(*key, samples[key], expected[key]) for key in samples]
    return Count(saved.seq_length, min(parts[0]["start"], consumed), datasets)


def _of_role(part: Mapping[str, Any], role: str, place: int) -> int:
    """Samples of a role before a place in the run; see ``ComposedDataset``."""
    if role == "learn":
        return place
    batches, rest = divmod(place, part["batch"])
    assert rest == 0, "the batch size of an unlearning run is fixed"
    return int(batches * (part["forget"] if role == "forget" else part["batch"] - part["forget"]))


def _count_blend(blend: Blend, first: int, last: int) -> NDArray[np.int64]:
    """Samples of each data set of a blend among its samples from first to last."""
    datasets = len(blend["datasets"])
    if datasets == 1:
        return np.array([last - first])
    index = dataset_index(blend, last)
    counts = np.zeros(datasets, dtype=np.int64)
    for start in range(first, last, _CHUNK):
        part = np.asarray(index[start : min(start + _CHUNK, last)])
        counts += np.bincount(part, minlength=datasets)
    return counts


def dataset_index(blend: Blend, end: int) -> NDArray[np.int16]:
    """Which data set each sample of a blend comes from, int16 ``[samples]``.

    The run's own cached index; without one, as Megatron builds it from the recorded weights.

    Args:
        blend: a record of ``record_start``.
        end: samples that are needed.

    Raises:
        DataError: the file is not the index of this blend.
    """
    file = blend.get("index")
    if file is None or not Path(file).is_file():
        return _rebuild(blend)
    try:
        index: NDArray[np.int16] = np.load(file, mmap_mode="r")
    except (ValueError, EOFError, OSError) as error:
        raise DataError(f"{file} cannot be read: {error}") from error
    if index.dtype != np.int16 or index.ndim != 1 or len(index) < end:
        raise DataError(
            f"{file}: expected the data set of each of {end} samples, found {index.dtype} {index.shape}"
        )
    return index


def _rebuild(blend: Blend) -> NDArray[np.int16]:
    """Megatron's own function; both arrays in memory, 10 bytes a sample."""
    from megatron.core.datasets import helpers

    datasets, weights, size = len(blend["datasets"]), blend["weights"], blend["size"]
    length = sum(weights) if size is None else size
    index, numbers = np.zeros(length, dtype=np.int16), np.zeros(length, dtype=np.int64)
    if size is None:
        helpers.build_exhaustive_blending_indices(index, numbers, weights, datasets)
    else:
        helpers.build_blending_indices(index, numbers, weights, datasets, size, False)
    return index


def shares(counted: Sequence[Consumed]) -> list[float]:
    """Of each data set, its part of what was consumed in its role."""
    totals: dict[str, int] = {}
    for one in counted:
        totals[one.role] = totals.get(one.role, 0) + one.samples
    return [one.samples / totals[one.role] if totals[one.role] else 0.0 for one in counted]
