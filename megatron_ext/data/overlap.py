"""Text that is to be forgotten must not be replayed: cheap checks before anything expensive.

Found are the same files, files of the same content, and documents that are in the samples of both
manifests; ``tools/verify_data.py --against`` compares all documents.
"""

from __future__ import annotations

from argparse import Namespace

from megatron.training.utils import get_blend_and_blend_per_split

from megatron_ext.config import UnlearnConfig
from megatron_ext.data.document_digests import shared_in_samples
from megatron_ext.data.indexed import bin_path
from megatron_ext.data.manifest import Manifest, read_manifest
from megatron_ext.data.providers import Blend, forget_blends
from megatron_ext.exceptions import DataError


def check_overlap(args: Namespace, config: UnlearnConfig) -> None:
    """Refuse a run that would forget and replay the same documents.

    Args:
        args: Megatron's validated arguments; the files were checked.
        config: the settings of unlearning.

    Raises:
        DataError: names the two data sets and what they share.
    """
    if not config.enabled or config.allow_data_overlap:
        return
    replayed = {
        path: read_manifest(path) for path in _prefixes(get_blend_and_blend_per_split(args))
    }
    for forgotten in _prefixes(forget_blends(config)):
        manifest = read_manifest(forgotten)
        for other, of_other in replayed.items():
            shared = shared_content(forgotten, manifest, other, of_other)
            if shared is not None:
                raise DataError(
                    f"--forget-data-path {forgotten}: expected text that is not replayed, found {shared} as "
                    f"in {other}, which is; --allow-data-overlap goes on"
                )


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


def _prefixes(blends: tuple[Blend, list[Blend] | None]) -> list[str]:
    """Every data set of a blend, whatever the split, once."""
    blend, per_split = blends
    every = [blend] if blend is not None else per_split or []
    return list(dict.fromkeys(path for part in every if part is not None for path in part[0]))
