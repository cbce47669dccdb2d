"""What is finished of a long run, kept line by line so that the next start goes on from there."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from megatron_ext.data.atomic import lock
from megatron_ext.exceptions import ConfigError, DataError

logger = logging.getLogger(__name__)

SUFFIX = ".progress"


@contextmanager
def kept_from_before(output: Path) -> Iterator[None]:
    """Say, when a run is interrupted before it opens its journal, that there is one of an earlier run."""
    try:
        yield
    except KeyboardInterrupt as stop:
        path = output.with_name(output.name + SUFFIX)
        if not str(stop) and path.exists():
            message = f"{path} is kept, the same command goes on from there"
            raise KeyboardInterrupt(message) from stop
        raise


class Journal:
    """Results by key, in a file beside the output until that is written.

    Args:
        output: the file that the run makes.
        settings: all that the results depend on; those of other settings are not taken over.

    Raises:
        ConfigError: a run with other settings was interrupted here.
        DataError: another run is writing here, or what is there cannot be read.
    """

    def __init__(self, output: Path, *, settings: Mapping[str, Any]) -> None:
        self.path = output.with_name(output.name + SUFFIX)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
        self._file = self.path.open("ab+")
        try:
            self._lock()
            self._done, size = self._read(digest)
        except BaseException:
            self._file.close()
            raise
        self._file.truncate(size)  # a line that a killed run left unfinished
        if size == 0:
            self._write({"settings": digest})

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Closes the file; it stays until `remove`."""
        self._file.close()

    def __len__(self) -> int:
        return len(self._done)

    def __contains__(self, key: str) -> bool:
        return key in self._done

    def __getitem__(self, key: str) -> Any:
        return self._done[key]

    def add(self, key: str, value: Any) -> None:
        """Keep a result that JSON can hold."""
        self._done[key] = value
        self._write({"key": key, "value": value})

    @contextmanager
    def filling(self, keys: Collection[str]) -> Iterator[None]:
        """Say how many of these results are there at the start, and when the work is interrupted."""
        if found := sum(key in self for key in keys):
            logger.info("%s of %s were found in %s", f"{found:,}", f"{len(keys):,}", self.path)
        try:
            yield
        except KeyboardInterrupt as stop:
            done = sum(key in self for key in keys)
            raise KeyboardInterrupt(
                f"{done:,} of {len(keys):,} are in {self.path}, the same command goes on from there"
            ) from stop

    def remove(self) -> None:
        """Drop the file, once the output is written."""
        self.path.unlink(missing_ok=True)

    def _lock(self) -> None:
        try:
            lock(self._file, self.path)
        except BlockingIOError:
            raise DataError(f"another run is writing {self.path}") from None
        except DataError:  # a file system without locks
            if not self.path.stat().st_size:
                self.path.unlink()
            raise

    def _read(self, digest: str) -> tuple[dict[str, Any], int]:
        """Finished results, and the bytes of the lines that hold them."""
        self._file.seek(0)
        done: dict[str, Any] = {}
        size = 0
        for number, line in enumerate(self._file, start=1):
            if not line.endswith(b"\n"):
                break
            try:
                record = json.loads(line)
            except ValueError as error:
                raise DataError(
                    f"{self.path}, line {number}: expected a result of the run that was interrupted here, "
                    f"found {line[:40]!r} ({error}); cut the file before it, or remove it to begin anew"
                ) from error
            if size == 0 and record != {"settings": digest}:
                raise ConfigError(
                    f"{self.path}: expected the settings of the run that was interrupted here, found "
                    "others; give those again, or remove the file"
                )
            size += len(line)
            if "key" in record:
                done[record["key"]] = record["value"]
        return done, size

    def _write(self, record: dict[str, Any]) -> None:
        self._file.write(json.dumps(record, ensure_ascii=False).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())
