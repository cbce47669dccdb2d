"""Megatron's GPT dataset that knows what it was made from: in its cache's names, and in every sample."""

from __future__ import annotations

import functools
import hashlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core.datasets.gpt_dataset import GPTDataset

from megatron_ext.data.index_cache import load_or_build
from megatron_ext.data.indexed import bin_path, idx_path, spread
from megatron_ext.data.manifest import manifest_path, read_manifest

# Bytes that are read at each spot of an index without a manifest, to tell it from another of the same size.
_SPOT_BYTES = 4096


class SourcedGPTDataset(GPTDataset):
    """Samples with keys ``source`` and ``dataset``; indices whose cache belongs to this very data.

    Megatron names cached indices by a digest of the settings and of the data set's path, not of its
    content. Text that is tokenised again under the same prefix meets the indices of the text before, and
    with them other samples, or none.
    """

    cached_loss_mask: Any

    def _build_document_sample_shuffle_indices(self) -> Any:
        """Name the cache by the data as well, before Megatron looks for it."""
        self.unique_identifiers["content"] = content_key(self.dataset_path)
        self.unique_description = json.dumps(
            self.unique_identifiers, indent=4, default=lambda obj: obj.unique_identifiers
        )
        self.unique_description_hash = hashlib.md5(
            self.unique_description.encode(), usedforsecurity=False
        ).hexdigest()
        names = ("document_index.npy", "sample_index.npy", "shuffle_index.npy")
        stem = f"{self.unique_description_hash}-{type(self).__name__}-{self.index_split.name}"
        indices = load_or_build(
            self, self._cache_folder(), stem, names, super()._build_document_sample_shuffle_indices
        )
        if not self.config.defer_npy_index_mmap:
            # Read to build the indices alone: 4 bytes a document, on every rank.
            self.indices = np.empty(0, dtype=np.int32)
        return indices

    def _cache_folder(self) -> Path:
        """Where Megatron looks for the cache."""
        if self.config.path_to_cache:
            return Path(self.config.path_to_cache)
        return Path(self.dataset.path_prefix) / "cache" / f"{type(self).__name__}_indices"

    def _query_document_sample_shuffle_indices(self, idx: int) -> tuple[Any, Any, Any]:
        """Remember the documents of the sample that is being read."""
        queried: tuple[Any, Any, Any] = super()._query_document_sample_shuffle_indices(idx)
        self._documents = queried[1]
        return queried

    def __getitem__(self, idx: int | None) -> dict[str, Any]:
        """Megatron's sample; under ``dataset`` its prefix, under ``source`` also sample and documents."""
        sample: dict[str, Any] = super().__getitem__(idx)
        if sample["loss_mask"] is self.cached_loss_mask:
            # Megatron has masked the padding of this sample in what it keeps for all that follow.
            self.cached_loss_mask = torch.ones_like(sample["loss_mask"])
        documents = np.unique(self._documents).tolist()
        source = f"sample {idx} of {self.dataset_path} (documents {_shorten(documents)})"
        return {**sample, "source": source, "dataset": self.dataset_path}


def content_key(prefix: str | None) -> str | None:
    """Tells data of a prefix from other data that was, or will be, under the same one.

    Args:
        prefix: path without ``.bin`` and ``.idx``; ``None`` or a place that is no local file has no key.

    Returns:
        The content digest of the manifest, or else a digest of the index's size and evenly spaced
        parts, and of the size of the tokens. Not of dates: copies on the disks of several nodes have
        different ones, and one key.
    """
    if prefix is None or not idx_path(prefix).is_file():
        return None
    states = tuple(
        (found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)
        if (found := _stat(path))
        else None
        for path in (manifest_path(prefix), idx_path(prefix), bin_path(prefix))
    )
    return _read_key(prefix, states)


@functools.lru_cache(maxsize=8192)
def _read_key(prefix: str, states: tuple[object, ...]) -> str:
    """The key, read once for the three splits of a data set while its files are in the same state."""
    manifest = read_manifest(prefix)
    if manifest is not None and manifest.content_digest is not None:
        return manifest.content_digest
    index = idx_path(prefix)
    size = index.stat().st_size
    digest = hashlib.sha256(f"{size} ".encode())
    tokens = _stat(bin_path(prefix))
    digest.update(f"{tokens and tokens.st_size} ".encode())
    with index.open("rb") as stream:
        for start in spread(size, _SPOT_BYTES):
            stream.seek(start)
            digest.update(stream.read(_SPOT_BYTES))
    return digest.hexdigest()


def _stat(path: Path) -> os.stat_result | None:
    return path.stat() if path.is_file() else None


def _shorten(numbers: list[int], most: int = 8) -> str:
    """The first of them, and how many more there are."""
    text = ", ".join(map(str, numbers[:most]))
    return text if len(numbers) <= most else f"{text} and {len(numbers) - most} more"
