"""Which files are the input: names, globs and directories become files of a known format."""

import glob
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from megatron_ext.data.compression import COMPRESSIONS
from megatron_ext.data.manifest import MANIFEST_SUFFIX
from megatron_ext.exceptions import ConfigError

InputFormat = Literal["auto", "jsonl", "parquet", "text"]

FORMATS: dict[str, InputFormat] = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".parquet": "parquet",
    ".txt": "text",
    ".text": "text",
    ".md": "text",
}


def find_inputs(patterns: Sequence[str], *, input_format: InputFormat = "auto") -> list[Path]:
    """Resolves files, globs and directories to files, in the order given, sorted within each.

    Of a directory those with a known name are taken, at any depth, also behind symbolic links, but no
    hidden ones and no manifests, which preprocessing leaves beside its data sets.

    Raises:
        ConfigError: Nothing matches, a file is named twice, or plain and compressed, its format is not known
            by its name, or a directory holds plain text beside records, of which one is most often no data.
    """
    found: list[Path] = []
    for pattern in patterns:
        path = Path(pattern)
        if path.is_dir():
            matches = _of_directory(path, input_format)
        elif path.exists():
            matches = [path]
        else:
            matches = sorted(filter(Path.is_file, map(Path, glob.glob(pattern, recursive=True))))
            if not matches:
                raise ConfigError(f"--input {pattern}: no such file")
        found.extend(matches)
    seen: dict[Path, Path] = {}
    for path in found:
        file = path.resolve()
        # What decompression has left behind is the same text a second time.
        key = file.with_suffix("") if file.suffix in COMPRESSIONS else file
        if key in seen:
            how = "twice" if seen[key] == path else f"and {seen[key]}, expected one of them"
            raise ConfigError(f"--input names {path} {how}")
        seen[key] = path
        if not path.is_file():
            raise ConfigError(
                f"--input {path}: expected a regular file, for its start is read twice"
            )
        if input_format == "auto" and not _known(path):
            raise ConfigError(
                f"{path}: expected {_expected()}; give --input-format for another name"
            )
    return found


def _of_directory(directory: Path, input_format: InputFormat) -> list[Path]:
    # Not Path.rglob, which says nothing of what it leaves out: behind symbolic links, and unreadable.
    found: list[Path] = []
    seen: set[str] = set()
    for folder, below, names in os.walk(directory, followlinks=True, onerror=_raise):
        if (place := os.path.realpath(folder)) in seen:  # links may lead in a circle
            below.clear()
            continue
        seen.add(place)
        below[:] = sorted(name for name in below if not name.startswith("."))
        found += [Path(folder, name) for name in names if not name.startswith(".")]
    known = (path for path in sorted(found) if path.is_file() and _known(path))
    matches = [path for path in known if not path.name.endswith(MANIFEST_SUFFIX)]
    if not matches:
        raise ConfigError(f"--input {directory}: no {_expected()} file in this directory")
    texts = [path for path in matches if format_of(path, input_format=input_format) == "text"]
    records = [path for path in matches if path not in texts]
    if texts and records:
        raise ConfigError(
            f"--input {directory}: expected records or plain text in a directory, found both "
            f"({records[0]}, {texts[0]}); name the files, or give a quoted glob"
        )
    return matches


def _raise(error: OSError) -> None:
    raise error


def format_of(path: Path, *, input_format: InputFormat = "auto") -> InputFormat:
    """The format of a file, by its name unless told."""
    if input_format != "auto":
        return input_format
    name = path.with_suffix("") if path.suffix in COMPRESSIONS else path
    return FORMATS.get(name.suffix, "auto")


def _known(path: Path) -> bool:
    return format_of(path) != "auto"


def _expected() -> str:
    return f"{', '.join(FORMATS)} (also with {', '.join(COMPRESSIONS)})"
