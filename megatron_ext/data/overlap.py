"""Text that is to be forgotten must not be replayed: cheap checks before anything expensive.

Found are the same files, files of the same content, and documents that are in the samples of both
manifests; ``tools/verify_data.py --against`` compares all documents.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from megatron.training.utils import get_blend_and_blend_per_split
from numpy.typing import NDArray

from megatron_ext.config import UnlearnConfig
from megatron_ext.data.document_digests import shared_in_samples
from megatron_ext.data.indexed import bin_path
from megatron_ext.data.manifest import Manifest, read_manifest
from megatron_ext.data.providers import forget_blends, prefixes
from megatron_ext.data.read_digests import different_starts
from megatron_ext.exceptions import DataError


def check_overlap(args: Namespace, config: UnlearnConfig) -> None:
    """Refuse a run that would forget and replay the same documents.

    Args:
        args: Megatron's validated arguments; the files were checked.
        config: the settings of unlearning.

    Raises:
        DataError: names the two data sets and what they share, or that this cannot be told.
    """
    if not config.enabled or config.allow_data_overlap:
        return
    found = find_shared(
        prefixes(*forget_blends(config)), prefixes(*get_blend_and_blend_per_split(args))
    )
    if found is not None:
        forgotten, other, shared = found
        raise DataError(
            f"--forget-data-path {forgotten}: expected text that is not replayed, found {shared} as "
            f"in {other}, which is replayed; --allow-data-overlap runs nevertheless"
        )


def find_shared(forgotten: Sequence[str], replayed: Sequence[str]) -> tuple[str, str, str] | None:
    """The first data set of one side that shares something with one of the other.

    Not pair by pair: a hundred data sets against a thousand are a hundred thousand pairs.

    Args:
        forgotten: prefixes.
        replayed: prefixes of the other side.

    Returns:
        Both prefixes and what they share, as ``shared_content`` says it; ``None`` if nothing.

    Raises:
        DataError: this cannot be told, for texts begin with BOS in one data set and without in another.
    """
    files: dict[Path, int] = {}
    contents: dict[str, int] = {}
    samples: list[NDArray[np.uint64]] = []
    starts: list[list[int] | None] = []
    for number, prefix in enumerate(replayed):
        manifest = read_manifest(prefix)
        files.setdefault(bin_path(prefix).resolve(), number)
        if manifest is not None and manifest.content_digest is not None:
            contents.setdefault(manifest.content_digest, number)
        samples.append(_sample(manifest))
        starts.append(None if manifest is None else manifest.before_text)
    digests = np.concatenate([np.empty(0, np.uint64), *samples])
    owners = np.repeat(np.arange(len(samples)), [len(sample) for sample in samples])
    order = np.argsort(digests, kind="stable")  # of a digest the first owner comes first
    digests, owners = digests[order], owners[order]
    for prefix in forgotten:
        manifest = read_manifest(prefix)
        starts.append(None if manifest is None else manifest.before_text)
        sample = _sample(manifest)
        places = np.searchsorted(digests, sample)
        inside = places < len(digests)
        hits = places[inside][digests[places[inside]] == sample[inside]]
        content = None if manifest is None else manifest.content_digest
        named = [files.get(bin_path(prefix).resolve()), contents.get(content or "")]
        sharing = [*owners[hits].tolist(), *(number for number in named if number is not None)]
        if sharing:
            other = replayed[min(sharing)]
            shared = shared_content(prefix, manifest, other, read_manifest(other))
            assert shared is not None
            return prefix, other, shared
    if different := different_starts([*replayed, *forgotten], starts):
        raise DataError(f"{different}; --allow-data-overlap runs nevertheless")
    return None


def _sample(manifest: Manifest | None) -> NDArray[np.uint64]:
    texts = () if manifest is None else manifest.document_sample or ()
    return np.frombuffer(bytes.fromhex("".join(texts)), dtype=">u8").astype(np.uint64)


def shared_content(
    first: str, of_first: Manifest | None, second: str, of_second: Manifest | None
) -> str | None:
    """What two data sets share, as far as their names and manifests tell.

    Args:
        first: prefix of the one.
        of_first: its manifest.
        second: prefix of the other.
        of_second: its manifest.
    """
    if bin_path(first).resolve() == bin_path(second).resolve():
        return "the same file"
    if of_first is None or of_second is None:
        return None
    if of_first.content_digest is not None and of_first.content_digest == of_second.content_digest:
        return "the same content"
    if of_first.document_sample is None or of_second.document_sample is None:
        return None
    samples = [[int(text, 16) for text in m.document_sample or ()] for m in (of_first, of_second)]
    shared, compared = shared_in_samples(*samples)
    return f"{shared} of {compared} sampled documents" if shared else None
