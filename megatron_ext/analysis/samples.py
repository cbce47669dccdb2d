"""Documents drawn from tokenised datasets of any size, in bounded memory and without Megatron."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from megatron_ext.data.indexed import bin_path, map_index, read_index_summary, spread
from megatron_ext.data.manifest import read_manifest
from megatron_ext.exceptions import ConfigError, DataError

# Bytes of each part of a .bin file that its fingerprint covers: 4 MiB in all.
_BLOCK = 1 << 16


def parse_sets(items: Sequence[str], *, flag: str = "--data") -> dict[str, str]:
    """Datasets by name from ``NAME=PREFIX`` words.

    Args:
        items: the words.
        flag: the flag they were given to, for messages.

    Raises:
        ConfigError: a word of another form, or a name that is given twice.
    """
    sets: dict[str, str] = {}
    for item in items:
        name, separator, prefix = item.partition("=")
        if not (name and separator and prefix):
            raise ConfigError(f"{flag}: expected NAME=PREFIX, found {item}")
        if name in sets:
            raise ConfigError(f"{flag}: expected each name once, found {name} twice")
        sets[name] = prefix
    return sets


def read_samples(prefix: str, *, count: int, length: int, seed: int) -> list[np.ndarray]:
    """Draw documents of a tokenised dataset without replacement.

    The index is mapped, not read, and the draw keeps no list of all documents, so memory is that of the
    samples alone.

    Args:
        prefix: path without ``.bin`` and ``.idx``.
        count: at most this many documents.
        length: tokens kept of a document, from its start.
        seed: of the draw.

    Returns:
        int64 arrays of at least one token each, in the order of the dataset; empty documents are left out.

    Raises:
        DataError: the dataset is missing or broken.
    """
    summary = read_index_summary(prefix)
    lengths, offsets, bounds = map_index(prefix, summary)
    if count < summary.documents:
        generator = np.random.default_rng(seed)
        chosen = generator.choice(summary.documents, size=count, replace=False, shuffle=False)
        chosen.sort()
    else:
        chosen = np.arange(summary.documents)
    samples = []
    # Read, not mapped: the kernel maps far more of a file than is asked for, and it counts as ours.
    with bin_path(prefix).open("rb") as stream:
        for document in chosen:
            parts: list[np.ndarray] = []
            wanted = length
            for sequence in range(int(bounds[document]), int(bounds[document + 1])):
                stream.seek(int(offsets[sequence]))
                size = min(wanted, int(lengths[sequence]))
                parts.append(np.fromfile(stream, dtype=summary.dtype, count=size).astype(np.int64))
                wanted -= size
                if wanted == 0:
                    break
            if wanted < length:
                samples.append(np.concatenate(parts))
    return samples


def check_samples(samples: Mapping[str, Sequence[np.ndarray]], *, minimum: int) -> None:
    """Refuse sets that are too small.

    Raises:
        DataError: one has fewer samples than the minimum.
    """
    for name, drawn in samples.items():
        if len(drawn) < minimum:
            raise DataError(
                f"--data {name}: expected at least {minimum} samples with text, found {len(drawn)}"
            )


def describe_dataset(prefix: str) -> dict[str, Any]:
    """What a dataset is, for the record: sizes, tokenizer, and hashes of its content.

    The manifest has the hash of all content, if this project's tool made the dataset. Any dataset has a
    sampled one, made here: SHA-256 of the size of the ``.bin`` file and 64 evenly spaced blocks of 64 KiB,
    which is all of a small dataset and a sample of a large one, which would take hours to read.

    Raises:
        DataError: the dataset or its manifest is missing or broken.
    """
    summary = read_index_summary(prefix)
    manifest = read_manifest(prefix)
    path = bin_path(prefix)
    size = path.stat().st_size
    digest = hashlib.sha256(f"{size} {summary.dtype}".encode())
    with path.open("rb") as stream:
        for start in spread(size, _BLOCK):
            stream.seek(start)
            digest.update(stream.read(_BLOCK))
    return {
        "prefix": str(prefix),
        "documents": summary.documents,
        "tokens": summary.tokens,
        "content_sha256": None if manifest is None else manifest.content_digest,
        "sampled_sha256": digest.hexdigest(),
        "tokenizer_sha256": None if manifest is None else manifest.tokenizer_digest,
    }
