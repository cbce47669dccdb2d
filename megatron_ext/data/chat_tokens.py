"""The tokens of all conversations, made once and kept: by the other ranks, and for the next start."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import tempfile
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from megatron_ext.data.atomic import lock
from megatron_ext.data.chat import read_conversations
from megatron_ext.data.chat_template import ChatTemplate
from megatron_ext.data.records import BadRecord
from megatron_ext.exceptions import DataError

logger = logging.getLogger(__name__)

# Of what is written to the cache; another number makes older files be ignored.
_FORMAT = 2
_SHOWN = 5


@dataclass(frozen=True)
class ChatTokens:
    """Tokenised conversations, each with at least one token of the assistant.

    Attributes:
        ids: int32 ``[tokens]``.
        mask: uint8 ``[tokens]``, 1 where the assistant writes the token.
        bounds: int64 ``[conversations + 1]``, of each conversation in the tokens.
        truncated: conversations cut at the end, for they were longer than a sequence.
        lost: tokens that were cut off.
        dropped: conversations left out, for nothing of the assistant was left of them.
        digest: SHA-256 of all that the tokens depend on.
    """

    ids: NDArray[np.int32]
    mask: NDArray[np.uint8]
    bounds: NDArray[np.int64]
    truncated: int
    lost: int
    dropped: int
    digest: str

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each conversation."""
        return np.diff(self.bounds)

    def describe(self) -> str:
        """What there is, in words."""
        assistant = int(self.mask.sum(dtype=np.int64))
        return (
            f"{len(self.bounds) - 1:,} conversations, {len(self.ids):,} tokens ({assistant:,} of the "
            f"assistant); {self.truncated:,} truncated by {self.lost:,} tokens, {self.dropped:,} dropped"
        )


def load_tokens(
    paths: Sequence[Path],
    template: ChatTemplate,
    *,
    limit: int,
    tokenizer_digest: str,
    cache: Path | None = None,
) -> ChatTokens:
    """Tokenise conversations, or map what an earlier start or another rank has written.

    Args:
        paths: JSON lines of conversations.
        template: makes tokens of them.
        limit: tokens of a conversation that are kept.
        tokenizer_digest: of the tokenizer's model.
        cache: directory to keep the tokens in; without one each rank makes its own.

    Raises:
        DataError: a file cannot be read, a record is no conversation, or there is none.
    """
    settings = [_FORMAT, limit, template.source, template.special_tokens, tokenizer_digest]
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for path in paths:
        digest.update(_file_digest(path))
    key = digest.hexdigest()
    if cache is None:
        return _tokenise(paths, template, limit, key)
    names = [cache / f"chat_{key[:32]}.{part}" for part in ("ids", "mask", "bounds", "json")]
    if names[-1].is_file():
        return _map(names)
    # One process works, the others wait here and then read its files. The lock only saves work: where it
    # does not reach other machines, or a file system has none, each makes the same files.
    place = cache / f"chat_{key[:32]}.lock"
    with _lock_file(place) as file:
        try:
            lock(file, place, wait=True)
        except (OSError, DataError) as error:
            logger.warning("each process may tokenise the conversations itself: %s", error)
        if not names[-1].is_file():
            _save(_tokenise(paths, template, limit, key), names)
    return _map(names)


def _lock_file(place: Path) -> BinaryIO:
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        return place.open("wb")
    except OSError as error:
        raise DataError(
            f"--data-cache-path {place.parent}: expected a directory to write the tokenised conversations "
            f"to, or one that has them, found {error}"
        ) from error


def _tokenise(paths: Sequence[Path], template: ChatTemplate, limit: int, digest: str) -> ChatTokens:
    ids, mask, bounds = array("i"), bytearray(), array("q", [0])
    bad: list[str] = []
    records = truncated = lost = dropped = bad_count = 0
    for record in tqdm(read_conversations(paths), unit=" conversations", disable=None):
        records += 1
        try:
            if isinstance(record, BadRecord):
                raise DataError(str(record))
            try:
                new_ids, new_mask = template.encode(record.messages)
            except DataError as error:
                raise DataError(f"{record.where}: {error}") from error
        except DataError as error:
            bad_count += 1
            bad += [str(error)] if len(bad) < _SHOWN else []
            continue
        if not any(new_mask[:limit]):
            dropped += 1
            continue
        truncated += len(new_ids) > limit
        lost += max(0, len(new_ids) - limit)
        ids.extend(new_ids[:limit])
        mask.extend(new_mask[:limit])
        bounds.append(len(ids))
    if bad:
        more = f"; and {bad_count - len(bad)} more" if bad_count > len(bad) else ""
        raise DataError(f"{bad_count} of {records} conversations are bad: {'; '.join(bad)}{more}")
    if len(bounds) == 1:
        names = ", ".join(map(str, paths))
        raise DataError(
            f"{names}: expected conversations with tokens of the assistant, found "
            f"{records} conversations, {dropped} of them without any in the first {limit} tokens"
        )
    return ChatTokens(
        ids=np.frombuffer(ids, np.int32),
        mask=np.frombuffer(mask, np.uint8),
        bounds=np.frombuffer(bounds, np.int64),
        truncated=truncated,
        lost=lost,
        dropped=dropped,
        digest=digest,
    )


def _save(tokens: ChatTokens, names: Sequence[Path]) -> None:
    counts = {name: getattr(tokens, name) for name in ("truncated", "lost", "dropped", "digest")}
    arrays: list[NDArray[Any]] = [tokens.ids, tokens.mask, tokens.bounds]
    for name, values in zip(names[:3], arrays, strict=True):
        _publish(name, partial(np.lib.format.write_array, array=values))
    # Last: it is the mark of a complete set.
    _publish(names[3], lambda file: file.write(json.dumps(counts).encode()))


def _publish(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Let a complete file appear under its name, unless another machine has published the same by now.

    A file is never replaced: over NFS that would pull it from under those who have mapped it.
    """
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=path.name, suffix=".partial") as file:
        write(cast(BinaryIO, file))
        file.flush()
        os.fsync(file.fileno())
        os.chmod(file.name, 0o644)
        with contextlib.suppress(FileExistsError):
            os.link(file.name, path)


def _map(names: Sequence[Path]) -> ChatTokens:
    try:
        ids, mask, bounds = (np.load(name, mmap_mode="r") for name in names[:3])
        counts = json.loads(names[3].read_text())
    except (ValueError, EOFError, OSError) as error:
        raise DataError(
            f"{names[3].with_suffix('')}.*: expected the tokens of the conversations, as an earlier start "
            f"has written them, found a file that cannot be read: {error}; without "
            "these files they are made again"
        ) from error
    return ChatTokens(ids=ids, mask=mask, bounds=bounds, **counts)


def _file_digest(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").digest()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error}") from error
