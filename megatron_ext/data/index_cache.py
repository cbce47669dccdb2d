"""Megatron's cached indices, written whole or not at all, and built again where they cannot be read.

Megatron writes each array under its final name and takes a cache for complete as soon as all of its
files exist. A job that is killed in the last write leaves files that every later start fails to load;
one that shares the folder fails on what is still being written, and one that builds the same index
cuts the files under the feet of those that have mapped them, which kills them (SIGBUS). Here an index
is built in a folder of its own, flushed, and renamed file by file. Two jobs that build the same index
at once write the same bytes: the files of the first stay.

Rank 0 builds, the others wait at Megatron's barrier, at most for ``--distributed-timeout-minutes``.
"""

from __future__ import annotations

import contextlib
import filecmp
import functools
import logging
import os
import pickle
import time
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from megatron.core.datasets.blended_dataset import BlendedDataset
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder

from megatron_ext.data.atomic import free_mib, fsync
from megatron_ext.exceptions import DataError

logger = logging.getLogger(__name__)

Indices = tuple[Any, ...]

_DESCRIPTION, _DATASET_INDEX = "description.txt", "dataset_index.npy"
# What numpy raises for a file that was cut, emptied or filled with something else.
_UNREADABLE = (ValueError, EOFError, OSError, pickle.UnpicklingError)
# Names of what is being written, and seconds after which it is taken for one that a killed job left behind.
_PARTIAL, _ABANDONED = ".partial-", 24 * 3600.0


class WholeBlendedDataset(BlendedDataset):
    """Megatron's blend, its indices cached whole or not at all."""

    def _build_indices(self) -> Indices:
        folder = self.config.path_to_cache
        if not folder:  # Megatron keeps such a blend in memory, on every rank
            return super()._build_indices()
        names = (_DATASET_INDEX, "dataset_sample_index.npy")
        return load_or_build(self, Path(folder), _blend_stem(self), names, super()._build_indices)


def blend_index_file(blend: BlendedDataset) -> Path | None:
    """Where the data set of each sample of a blend is cached; ``None`` if it is not."""
    folder = blend.config.path_to_cache
    return Path(folder) / f"{_blend_stem(blend)}-{_DATASET_INDEX}" if folder else None


def _blend_stem(blend: BlendedDataset) -> str:
    return f"{blend.unique_description_hash}-{type(blend).__name__}-{blend.split.name}"


class DatasetBuilder(BlendedMegatronDatasetBuilder):
    """Megatron's builder, of blends whose cache is written whole or not at all."""

    @staticmethod
    def build_generic_dataset(cls: Any, *arguments: Any) -> Any:
        """Megatron's, see there."""
        cls = WholeBlendedDataset if cls is BlendedDataset else cls
        return BlendedMegatronDatasetBuilder.build_generic_dataset(cls, *arguments)


def load_or_build(
    dataset: Any, folder: Path, stem: str, names: Sequence[str], build: Callable[[], Indices]
) -> Indices:
    """Load the indices of a dataset from its cache, after building them there if need be.

    What was built is loaded as well, mapped: rank 0 holds no more memory than the others.

    Args:
        dataset: Megatron's, under construction.
        folder: of the cache.
        stem: what the names of its files begin with.
        names: of its arrays.
        build: Megatron's method. Loads if all files are in ``dataset.config.path_to_cache``, else builds
            them there.

    Raises:
        DataError: the index cannot be written, or is not where this rank looks for it.
    """
    # The description is the last to appear: without it Megatron does not look at the rest.
    files = [folder / f"{stem}-{name}" for name in (*names, _DESCRIPTION)]
    builds = not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0
    prebuilt = dataset.config.fast_cache_load or dataset.config.defer_npy_index_mmap
    if not builds or all(file.is_file() for file in files):
        try:
            indices = build()
            logger.info("%s/%s-* found", folder, stem)
            return indices
        except _UNREADABLE as error:
            if prebuilt or not builds:
                raise DataError(
                    f"--data-cache-path: expected the index {folder}/{stem}-*, on a disk that all nodes "
                    f"share, found none that can be read: {error}"
                ) from error
            logger.warning(
                "%s/%s-* cannot be read (%s): building the index again", folder, stem, error
            )
    elif prebuilt:
        raise DataError(
            f"--dataloader-fast-cache-load, --dataloader-defer-npy-index-mmap: expected an index that is "
            f"built already, found no {folder}/{stem}-*; tools/build_index.py builds it"
        )
    _build_whole(dataset, folder, files, build)
    logger.info("%s/%s-* built", folder, stem)
    return build()


def _build_whole(
    dataset: Any, folder: Path, files: Sequence[Path], build: Callable[[], Indices]
) -> None:
    """Have Megatron build under names of this process alone, and publish what it wrote."""
    own = f"{_PARTIAL}{uuid.uuid4().hex[:8]}-"
    written = [folder / f"{own}{file.name}" for file in files]
    digest = dataset.unique_description_hash
    dataset.unique_description_hash = own + digest  # which names begin with
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(folder)
        build()
        for file in written[:-1]:
            fsync(file)  # a name must not outlive a power cut that the content did not
        for source, file in zip(written, files, strict=True):
            # Over NFS a file that is replaced is pulled from under those who have mapped it elsewhere.
            if not (file.is_file() and filecmp.cmp(source, file, shallow=False)):
                os.replace(source, file)
    except OSError as error:
        raise DataError(
            f"{folder}: the index of the data cannot be written, with {free_mib(folder):.1f} MiB free on its "
            f"disk: {error}; --data-cache-path names another folder"
        ) from error
    finally:
        dataset.unique_description_hash = digest
        for file in written:
            file.unlink(missing_ok=True)


@functools.cache  # once a process: a thousand data sets have one folder
def _remove_abandoned(folder: Path) -> None:
    """Make room of what killed jobs left behind."""
    with os.scandir(folder) as entries:
        for entry in entries:
            if not entry.name.startswith(_PARTIAL):
                continue
            with contextlib.suppress(FileNotFoundError):  # its job has just finished
                if time.time() - entry.stat().st_mtime > _ABANDONED:
                    os.unlink(entry.path)
