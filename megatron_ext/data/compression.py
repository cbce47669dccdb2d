"""Opening plain and compressed files as one kind of stream."""

import codecs
import gzip
import io
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, cast

COMPRESSIONS = (".gz", ".zst", ".bz2", ".xz")
_READ_BYTES = 1 << 17
# What `zstd --long=31` may ask for, as large public corpora do; the default refuses more than 2^27.
# Taken only for frames that need it.
_ZSTD_WINDOW_BYTES = 1 << 31


class DamagedError(OSError):
    """The content of a compressed file is damaged."""


def open_stream(path: Path) -> tuple[BinaryIO, BinaryIO]:
    """Opens a file through its decompression.

    Returns:
        The stream of its content, for `read_parts` or `read_lines`, and the file itself, whose position
        tells the progress.

    Raises:
        EOFError: a compressed file has no bytes; even one of an empty text has some.
    """
    raw = path.open("rb")
    suffix = path.suffix.lower()
    if suffix not in COMPRESSIONS:
        return raw, raw
    if not path.stat().st_size:
        raw.close()
        raise EOFError("expected compressed data, found an empty file")
    content = _Content(*_reader(raw, suffix))
    return cast(BinaryIO, io.BufferedReader(content, buffer_size=1 << 20)), raw


def read_parts(stream: BinaryIO, size: int) -> Iterator[bytes]:
    """Yields the content in parts of a size, without a byte order mark.

    Raises:
        EOFError: the compressed data end early; all that is before that place was yielded.
        DamagedError: so with damaged data.
    """
    mark = codecs.BOM_UTF8
    while part := stream.read(size):
        yield part.removeprefix(mark)
        mark = b""
    stream.read(1)  # raises if this end is no end


def read_lines(stream: BinaryIO, most: int = -1) -> Iterator[bytes]:
    """Yields the lines with their ends, without a byte order mark; of a longer one `most` bytes at a time.

    Raises:
        EOFError: the compressed data end early; all lines that are whole were yielded.
        DamagedError: so with damaged data.
    """
    mark = codecs.BOM_UTF8
    while line := stream.readline(most):
        if not line.endswith(b"\n") and len(line) != most:
            stream.read(1)  # raises if this line was cut
        yield line.removeprefix(mark)
        mark = b""
    stream.read(1)


def _reader(raw: BinaryIO, suffix: str) -> tuple[Callable[[int], bytes | None], type[Exception]]:
    """What reads at most so many bytes of the content, and what it raises where that is damaged."""
    if suffix == ".gz":
        return gzip.GzipFile(fileobj=raw).read1, zlib.error
    if suffix == ".zst":
        return _ZstdStream(raw).read, DamagedError
    if suffix == ".bz2":
        import bz2

        return bz2.BZ2File(raw).read1, DamagedError
    import lzma  # like bz2 not in every build of Python

    return lzma.LZMAFile(raw).read1, lzma.LZMAError


class _Content(io.RawIOBase):
    """Decompressed content, which ends where it is cut or damaged; a read after that raises the error.

    Raised at once, it would take along what `io.BufferedReader` has gathered before that place.
    """

    def __init__(self, read: Callable[[int], bytes | None], damage: type[Exception]) -> None:
        self._read, self._damage = read, damage
        self._error: Exception | None = None

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        if self._error is not None:
            raise self._error
        try:
            data = self._read(len(buffer)) or b""
        except EOFError as error:
            self._error = error
            return 0
        except (self._damage, OSError) as error:
            if isinstance(error, OSError) and error.errno is not None:  # the disk's, not the data's
                raise
            self._error = DamagedError(str(error))
            return 0
        buffer[: len(data)] = data
        return len(data)


class _ZstdStream(io.RawIOBase):
    """Zstandard frames, one after another; a file cut within a frame is an error.

    `zstandard`'s own stream reader takes a cut file for a complete one.
    """

    def __init__(self, raw: BinaryIO) -> None:
        import zstandard

        self._raw = raw
        self._error = zstandard.ZstdError
        self._decompressor = zstandard.ZstdDecompressor(max_window_size=_ZSTD_WINDOW_BYTES)
        self._frame: Any = None
        self._input = b""
        self._output = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._output:
            self._input = self._input or self._raw.read(_READ_BYTES)
            if not self._input:
                if self._frame is not None:
                    raise EOFError("the compressed data end within a frame")
                return 0
            self._frame = self._frame or self._decompressor.decompressobj()
            try:
                self._output = memoryview(self._frame.decompress(self._input))
            except self._error as error:
                raise DamagedError(f"not valid Zstandard data: {error}") from error
            self._input = b""
            if self._frame.eof:
                self._input, self._frame = self._frame.unused_data, None
        count = min(len(buffer), len(self._output))
        buffer[:count] = self._output[:count]
        self._output = self._output[count:]
        return count
