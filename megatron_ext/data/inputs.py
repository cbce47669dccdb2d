"""Which files are the input: names, globs and directories become files of a known format."""

import glob
import logging
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from megatron_ext.data.compression import COMPRESSIONS
from megatron_ext.data.manifest import MANIFEST_SUFFIX
from megatron_ext.exceptions import ConfigError

logger = logging.getLogger(__name__)

InputFormat = Literal["auto", "jsonl", "parquet", "text"]

# Kinds of files that a line names at most.
_SHOWN = 6

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

    Of a directory, also of one that a glob matches, those with a known name are taken, at any depth, also
    behind symbolic links, but no manifests, which preprocessing leaves beside its data sets, and nothing
    whose name begins with `.` or `_`, as Hadoop's and Spark's readers do: it is hidden, or not finished. Log
    lines say what was taken and left out.

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
            matches = _of_glob(pattern, input_format)
        found.extend(matches)
    seen: dict[Path, Path] = {}
    for path in found:
        file = path.resolve()
        # What decompression has left behind is the same text a second time.
        key = _unpacked(file)
        if key in seen:
            how = "twice" if seen[key] == path else f"and {seen[key]}, expected one of them"
            raise ConfigError(f"--input names {path} {how}")
        seen[key] = path
        if not path.is_file():
            what = "a link to nothing" if not path.exists() else "something else"
            raise ConfigError(
                f"--input {path}: expected a regular file, for its start is read twice, found {what}"
            )
        if input_format == "auto" and not _known(path):
            raise ConfigError(
                f"{path}: expected {_expected()}; give --input-format for another name"
            )
    return found


def _of_glob(pattern: str, input_format: InputFormat) -> list[Path]:
    """What the shell would have made of the pattern, and `**`: the same files, quoted or not."""
    names = [Path(name) for name in sorted(glob.glob(pattern, recursive=True))]
    if not names:
        raise ConfigError(f"--input {pattern}: no such file")
    # Of `**` a folder is matched and what is in it as well.
    reached = {folder for name in names for folder in name.parents}
    found: list[Path] = []
    for name in names:
        if not name.is_dir():
            found.append(name)
        elif name not in reached:
            found += _of_directory(name, input_format)
    logger.info("--input %s: %s files", pattern, f"{len(found):,}")
    return found


def _of_directory(directory: Path, input_format: InputFormat) -> list[Path]:
    # Not Path.rglob, which says nothing of what it leaves out: behind symbolic links, and unreadable.
    found: list[Path] = []
    left_out = _Kinds()
    seen: set[str] = set()
    for folder, below, names in os.walk(directory, followlinks=True, onerror=_raise):
        if (place := os.path.realpath(folder)) in seen:  # links may lead in a circle
            below.clear()
            continue
        seen.add(place)
        below.sort()
        for name in (*sorted(names), *below):
            if name.startswith((".", "_")):
                left_out.add("hidden or unfinished", Path(folder, name))
        below[:] = [name for name in below if not name.startswith((".", "_"))]
        found += [Path(folder, name) for name in names if not name.startswith((".", "_"))]
    taken, texts, records = _Kinds(), list[Path](), list[Path]()
    for path in sorted(found):
        kind = _suffixes(path)
        if not path.is_file():
            left_out.add("that is no regular file", path)
        elif path.name.endswith(MANIFEST_SUFFIX) or not _known(path):
            left_out.add(kind, path)
        else:
            taken.add(kind, path)
            is_text = format_of(path, input_format=input_format) == "text"
            (texts if is_text else records).append(path)
    ignored = f"; left out: {left_out.describe(directory)}" if left_out.counts else ""
    if not taken.counts:
        raise ConfigError(f"--input {directory}: no {_expected()} file in this directory{ignored}")
    if texts and records:
        raise ConfigError(
            f"--input {directory}: expected records or plain text in a directory, found both "
            f"({records[0]}, {texts[0]}); name the files, or give a quoted glob"
        )
    logger.info("--input %s: taken: %s%s", directory, taken.describe(), ignored)
    return texts or records


class _Kinds:
    """How many files there are of each kind, and the first of each."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self._first: dict[str, Path] = {}

    def add(self, kind: str, path: Path) -> None:
        """Takes one file."""
        self.counts[kind] += 1
        self._first.setdefault(kind, path)

    def describe(self, below: Path | None = None) -> str:
        """The most frequent kinds; with a folder also the first file of each, as it is named below it."""
        shown = [
            f"{count:,} {kind}" + (f" ({self._first[kind].relative_to(below)})" if below else "")
            for kind, count in self.counts.most_common(_SHOWN)
        ]
        more = len(self.counts) - len(shown)
        return ", ".join(shown) + (f" and {more} more kinds" if more else "")


def _suffixes(path: Path) -> str:
    """The end of a name that tells its kind: of `a.b.jsonl.gz` it is `.jsonl.gz`."""
    if path.name.endswith(MANIFEST_SUFFIX):
        return MANIFEST_SUFFIX
    last = path.suffix.lower()
    inner = path.with_suffix("").suffix.lower() if last in COMPRESSIONS else ""
    return inner + last or "without a suffix"


def _raise(error: OSError) -> None:
    raise error


def format_of(path: Path, *, input_format: InputFormat = "auto") -> InputFormat:
    """The format of a file, by its name unless told."""
    if input_format != "auto":
        return input_format
    return FORMATS.get(_unpacked(path).suffix.lower(), "auto")


def _unpacked(path: Path) -> Path:
    return path.with_suffix("") if path.suffix.lower() in COMPRESSIONS else path


def _known(path: Path) -> bool:
    return format_of(path) != "auto"


def _expected() -> str:
    return f"{', '.join(FORMATS)} (also with {', '.join(COMPRESSIONS)})"
