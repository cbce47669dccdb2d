"""What a node sees of the shared file system, the data sets and the tokenizer."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_ext.data.indexed import bin_path, idx_path, read_index_summary
from megatron_ext.data.manifest import check_prefix, manifest_path, read_manifest
from megatron_ext.data.tokenizers import TokenizerSpec, build_reference, tokenizer_digest
from megatron_ext.exceptions import MegatronExtError

_EDGE = 1 << 20  # bytes at each end of a file that its digest reads


def write_probe(directory: Path, size: int) -> dict[str, Any]:
    """Write random bytes, as rank 0 does for the others to read.

    Args:
        directory: made where it alone is missing: above that, a name is mistyped or nothing is mounted.
        size: bytes.

    Returns:
        `file`, `digest`, `speed` in bytes a second, to the disk and not only to memory, and `made`, whether
        the directory was; or `error`.
    """
    path = directory / f"preflight-{os.getpid()}-{time.time_ns()}"
    block = os.urandom(1 << 20)
    digest = hashlib.sha256()
    made = not directory.exists()
    if made and not directory.parent.is_dir():
        return {"error": f"{directory}: expected a folder, found none, and no {directory.parent}"}
    try:
        directory.mkdir(exist_ok=True)
        begin = time.perf_counter()
        with path.open("wb") as stream:
            for _ in range(size >> 20):
                stream.write(block)
                digest.update(block)
            stream.flush()
            os.fsync(stream.fileno())
        seconds = time.perf_counter() - begin
    except OSError as error:
        path.unlink(missing_ok=True)
        return {"error": f"{directory}: cannot be written: {error.strerror}"}
    speed = size / seconds
    return {"file": str(path), "digest": digest.hexdigest(), "speed": speed, "made": made}


def read_probe(probe: dict[str, Any], *, patience: float) -> dict[str, Any]:
    """Read what rank 0 wrote, and write beside it: all ranks write parts of a checkpoint.

    Args:
        probe: what `write_probe` returned.
        patience: seconds until the file must be visible; network file systems keep directories for a while.

    Returns:
        `waited` in seconds and `free` in bytes, or `error`.
    """
    path = Path(probe["file"])
    begin = time.monotonic()
    while not path.exists():
        if time.monotonic() - begin > patience:
            return {"error": f"{path.parent}: rank 0's file is not there: not the same folder"}
        time.sleep(0.1)
    waited = time.monotonic() - begin
    try:
        with path.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
        free = shutil.disk_usage(path.parent).free
    except OSError as error:
        return {"error": f"{path.parent}: cannot be read: {error.strerror}"}
    if digest != probe["digest"]:
        return {"error": f"{path.parent}: rank 0's file has other bytes here"}
    try:
        with tempfile.TemporaryFile(dir=path.parent) as stream:
            stream.write(b"0")
            stream.flush()
            os.fsync(stream.fileno())
    except OSError as error:
        return {"error": f"{path.parent}: can be read, but not written: {error.strerror}"}
    return {"waited": waited, "free": free}


def dataset(prefix: str, tokenizer: dict[str, Any]) -> dict[str, Any]:
    """A cheap look at a data set: index, sizes, manifest, and the tokenizer if one was given.

    Args:
        prefix: as `--data-path` names it.
        tokenizer: what `tokenizer_facts` returned.

    Returns:
        `digest` of its manifest and of the ends of its files, `tokens` and `manifest`, whether there is
        one; or `error`.
    """
    try:
        summary = read_index_summary(prefix)
        manifest = read_manifest(prefix)
        if "digest" in tokenizer:
            check_prefix(
                prefix, vocab_size=tokenizer["vocab_size"], tokenizer_digest=tokenizer["digest"]
            )
        elif manifest is not None:
            check_prefix(prefix, vocab_size=manifest.vocab_size)
        digest = hashlib.sha256()
        paths = [bin_path(prefix), idx_path(prefix)]
        for path in paths if manifest is None else [*paths, manifest_path(prefix)]:
            _update(digest, path)
    except (MegatronExtError, OSError) as error:
        return {"error": " ".join(str(error).split())}
    return {
        "digest": digest.hexdigest()[:16],
        "tokens": summary.tokens,
        "manifest": manifest is not None,
    }


def _update(digest: Any, path: Path) -> None:
    size = path.stat().st_size
    digest.update(f"{path.name} {size}\0".encode())
    with path.open("rb") as stream:
        digest.update(stream.read(_EDGE))
        stream.seek(max(0, size - _EDGE))
        digest.update(stream.read(_EDGE))


def read_input(path: str) -> dict[str, Any]:
    """A cheap look at a file, or at the latest checkpoint of a folder; no file is read in full.

    Returns:
        `found`, what all nodes must see, or `error`.
    """
    place, digest = Path(path), hashlib.sha256()
    try:
        if not place.is_dir():
            _update(digest, place)
            return {"found": f"{place.stat().st_size:,} bytes, digest {digest.hexdigest()[:16]}"}
        tracker = place / "latest_checkpointed_iteration.txt"
        if not tracker.is_file():
            return {"error": f"{path}: expected a checkpoint, found no {tracker.name}"}
        latest = tracker.read_text(errors="replace").strip()
        folder = place / (f"iter_{int(latest):07d}" if latest.isdecimal() else latest)
        names = sorted(entry.name for entry in folder.iterdir())
        digest.update("\0".join(names).encode())
        if ".metadata" in names:
            _update(digest, folder / ".metadata")
    except OSError as error:
        return {"error": f"{path}: cannot be read: {error.strerror}"}
    return {"found": f"{folder.name}, {len(names)} files, digest {digest.hexdigest()[:16]}"}


def tokenizer_facts(spec: TokenizerSpec | None) -> dict[str, Any]:
    """`digest` and `vocab_size` of a tokenizer, `error`, or nothing if none was given."""
    if spec is None:
        return {}
    try:
        return {"digest": tokenizer_digest(spec), "vocab_size": build_reference(spec).vocab_size}
    except (MegatronExtError, OSError, RuntimeError, ValueError) as error:
        return {"error": f"{spec.tokenizer_model}: {' '.join(str(error).split())}"}


def all_datasets(prefixes: Sequence[str], spec: TokenizerSpec | None) -> dict[str, Any]:
    """The tokenizer, and each data set by prefix."""
    tokenizer = tokenizer_facts(spec)
    return {"tokenizer": tokenizer, "data": {p: dataset(p, tokenizer) for p in prefixes}}
