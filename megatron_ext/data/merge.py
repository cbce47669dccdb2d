"""Joins data sets into one, to the byte as if the inputs of all had been tokenised in one run.

Megatron-LM's `merge_datasets.py` joins tokens and index; here manifests are joined too, contents are held
against them, and the files appear complete or not at all. Blocks of 32 MB and of 2^20 entries of an index are
in memory at a time, whatever the sizes.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_ext.data.atomic import (
    PARTIAL_SUFFIX,
    AtomicFiles,
    check_place,
    free_mib,
    refuse_existing,
)
from megatron_ext.data.indexed import (
    HEADER,
    MAGIC,
    TYPE_CODES,
    VERSION,
    DigestingStream,
    IndexSummary,
    bin_path,
    check_files,
    idx_path,
    map_index,
    read_index_summary,
)
from megatron_ext.data.manifest import (
    Manifest,
    check_prefix,
    join_manifests,
    manifest_path,
    read_manifest,
)
from megatron_ext.data.verify import check_index, file_blocks
from megatron_ext.exceptions import ConfigError, DataError

_BLOCK = 1 << 25
_ENTRIES = 1 << 20  # of an index, shifted at a time
_SINCE = ("before_text", "after_text")  # which manifests of earlier versions do not tell

Advance = Callable[[int], Any]


@dataclass(frozen=True)
class Merged:
    """What was written.

    Attributes:
        summary: Its size.
        has_manifest: Whether it has a manifest, as the data sets that were joined.
    """

    summary: IndexSummary
    has_manifest: bool


@dataclass(frozen=True)
class _Part:
    """One of the data sets that are joined."""

    prefix: str
    summary: IndexSummary
    manifest: Manifest | None


def merge(
    prefixes: Sequence[str],
    output: str,
    *,
    overwrite: bool = False,
    advance: Advance = lambda _: None,
) -> Merged:
    """Join data sets in the order given; documents and their sequences stay as they are.

    Args:
        prefixes: Two or more, without `.bin` and `.idx`.
        output: Prefix of the data set that is written.
        overwrite: Whether one that exists already may be replaced.
        advance: Called with the bytes of tokens that were copied since the last call.

    Raises:
        ConfigError: Too few data sets, one named twice or as the output; an output that exists, has no place
            or would not fit on its disk. Nothing is read then.
        DataError: A data set is unfinished, broken, of another tokenizer or type, or has other content than
            its manifest says. Nothing is written then.
    """
    has_manifest = _check_names(prefixes, output, overwrite=overwrite)
    parts = _check_parts(prefixes)
    _check_room(parts, output)
    for part in parts:
        check_index(part.prefix, part.summary)
    summary = _sum(parts)
    paths = [bin_path(output), *([manifest_path(output)] if has_manifest else []), idx_path(output)]
    with AtomicFiles(paths, overwrite=overwrite) as files:
        content = sha256()
        tokens = DigestingStream(files[bin_path(output)], content)
        for part in parts:
            _copy(part, tokens, advance)
        _write_index(parts, summary, DigestingStream(files[idx_path(output)], content))
        manifests = [part.manifest for part in parts if part.manifest is not None]
        if manifests:
            manifest = join_manifests(manifests, summary, content.hexdigest())
            files[manifest_path(output)].write(manifest.to_json())
        files.commit()
    return Merged(summary, has_manifest)


def _check_names(prefixes: Sequence[str], output: str, *, overwrite: bool) -> bool:
    """Refuses names that cannot work; whether the data sets have manifests."""
    if output.endswith("/"):
        raise ConfigError(
            f"--output: expected a folder and the name of a data set, found the folder {output} alone"
        )
    check_place(output, flag="--output")
    refuse_existing(
        [bin_path(output), manifest_path(output), idx_path(output)], overwrite=overwrite
    )
    if len(prefixes) < 2:
        raise ConfigError(f"expected two data sets to join or more, found {prefixes[0]} alone")
    names: dict[Path, str] = {}
    for prefix in prefixes:
        if (path := bin_path(prefix).resolve()) in names:
            raise ConfigError(
                f"{prefix}: expected each data set once, found {names[path]} named before"
            )
        names[path] = prefix
    if same := names.get(bin_path(output).resolve()):
        raise ConfigError(
            f"--output {output}: expected a new data set, found {same}, which is joined"
        )
    missing = [prefix for prefix in prefixes if not manifest_path(prefix).exists()]
    for prefix in missing:  # of a data set that is not there the manifest is the least
        _check_finished(prefix)
        check_files(prefix)
    if missing and len(missing) < len(prefixes):
        named = next(prefix for prefix in prefixes if prefix not in missing)
        raise DataError(
            f"{manifest_path(missing[0])} is missing: expected manifests of all data sets or of none, found "
            f"that of {named}"
        )
    if missing and manifest_path(output).exists():
        raise ConfigError(
            f"--output: the data sets have no manifests, found {manifest_path(output)}, which would not "
            "belong to what is written: remove it, or give another name"
        )
    return not missing


def _check_parts(prefixes: Sequence[str]) -> list[_Part]:
    """Looks at the ends of every data set and at its manifest."""
    parts: list[_Part] = []
    contents: dict[str, str] = {}
    for prefix in prefixes:
        _check_finished(prefix)
        part = _Part(prefix, read_index_summary(prefix), read_manifest(prefix))
        parts.append(part)
        first = parts[0]
        if part.summary.dtype != first.summary.dtype:
            raise DataError(
                f"{idx_path(prefix)}: expected ids of type {first.summary.dtype.name} as in {first.prefix}, "
                f"found {part.summary.dtype.name}"
            )
        if part.manifest is not None and first.manifest is not None:
            _check_manifest(part, part.manifest, first.manifest, first.prefix)
        if part.manifest is not None and part.manifest.content_digest is not None:
            other = contents.setdefault(part.manifest.content_digest, prefix)
            if other != prefix:
                raise DataError(
                    f"{bin_path(prefix)}: expected each data set once, found the content of {other}"
                )
    return parts


def _check_finished(prefix: str) -> None:
    for path in (idx_path(prefix), bin_path(prefix)):
        partial = path.with_name(path.name + PARTIAL_SUFFIX)
        if partial.exists():
            raise DataError(
                f"{partial} exists: expected a finished data set, found one that a run is writing, or "
                "was when it was killed; if none does, remove the file"
            )


def _check_manifest(part: _Part, manifest: Manifest, first: Manifest, of: str) -> None:
    """Whether a manifest belongs to its data set, and the data set to the first one."""
    check_prefix(
        part.prefix,
        vocab_size=first.vocab_size,
        tokenizer_digest=first.tokenizer_digest,
        other=f"that of {of}",
    )
    names = ("append_eod", "eod_id", "chat_template", "chat_template_digest", *_SINCE)
    for name in names:
        expected, found = getattr(first, name), getattr(manifest, name)
        unknown = name in _SINCE and None in (expected, found)
        if found != expected and not unknown:
            raise DataError(
                f"{manifest_path(part.prefix)}: expected {name} {expected} as in {of}, found {found}"
            )


def _check_room(parts: Sequence[_Part], output: str) -> None:
    needed = sum(part.summary.size + idx_path(part.prefix).stat().st_size for part in parts) / 2**20
    free = free_mib(Path(output).parent)
    if needed > free:
        raise ConfigError(
            f"--output {output}: expected {needed:,.1f} MiB free on its disk, found {free:,.1f}"
        )


def _sum(parts: Sequence[_Part]) -> IndexSummary:
    return IndexSummary(
        documents=sum(part.summary.documents for part in parts),
        sequences=sum(part.summary.sequences for part in parts),
        tokens=sum(part.summary.tokens for part in parts),
        dtype=parts[0].summary.dtype,
    )


def _copy(part: _Part, stream: DigestingStream, advance: Advance) -> None:
    """Appends the tokens of a data set; what it holds must be what its manifest says."""
    content, left = sha256(), part.summary.size
    known = part.manifest is not None and part.manifest.content_digest is not None
    for block in file_blocks(bin_path(part.prefix), _BLOCK):
        stream.write(block)
        if known:
            content.update(block)
        left -= len(block)
        advance(len(block))
    if left:
        raise DataError(f"{bin_path(part.prefix)} has changed its size by {-left} bytes meanwhile")
    if known:
        assert part.manifest is not None
        for block in file_blocks(idx_path(part.prefix), _BLOCK):
            content.update(block)
        if content.hexdigest() != part.manifest.content_digest:
            raise DataError(
                f"{manifest_path(part.prefix)}: expected content_digest {content.hexdigest()}, as the data "
                f"have it, found {part.manifest.content_digest}"
            )


def _write_index(parts: Sequence[_Part], summary: IndexSummary, stream: DigestingStream) -> None:
    """Writes one array of the index after the other, each through all data sets."""
    sizes = (summary.sequences, summary.documents + 1)
    stream.write(HEADER.pack(MAGIC, VERSION, TYPE_CODES[summary.dtype], *sizes))
    # Mapped anew for each array: a map keeps a file open, and there may be more than may be open.
    for part in parts:
        lengths, _, _ = map_index(part.prefix, part.summary)
        _write_shifted(stream, lengths, 0)
    position = 0
    for part in parts:
        _, offsets, _ = map_index(part.prefix, part.summary)
        _write_shifted(stream, offsets, position)
        position += part.summary.size
    stream.write(np.int64(0).tobytes())
    sequences = 0
    for part in parts:
        _, _, boundaries = map_index(part.prefix, part.summary)
        _write_shifted(stream, boundaries[1:], sequences)
        sequences += part.summary.sequences


def _write_shifted(stream: DigestingStream, values: NDArray[Any], by: int) -> None:
    for start in range(0, len(values), _ENTRIES):
        part = values[start : start + _ENTRIES]
        stream.write((part + part.dtype.type(by)).tobytes())
