"""Opening plain, gzip and Zstandard files as one kind of stream."""

import gzip
import io
from pathlib import Path
from typing import Any, BinaryIO, cast

COMPRESSIONS = (".gz", ".zst")
_READ_BYTES = 1 << 17
# What `zstd --long=31` may ask for, as large public corpora do; the default refuses more than 2^27.
# Taken only for frames that need it.
_ZSTD_WINDOW_BYTES = 1 << 31


def open_stream(path: Path) -> tuple[BinaryIO, BinaryIO]:
    """Opens a file through its decompression.

    Returns:
        The stream of its content, and the file itself, whose position tells the progress.

    Raises:
        EOFError: a compressed file has no bytes; even one of an empty text has some.
    """
    raw = path.open("rb")
    if path.suffix in COMPRESSIONS and not path.stat().st_size:
        raw.close()
        raise EOFError("expected compressed data, found an empty file")
    if path.suffix == ".gz":
        return cast(BinaryIO, gzip.GzipFile(fileobj=raw)), raw
    if path.suffix == ".zst":
        return cast(BinaryIO, io.BufferedReader(_ZstdStream(raw, path), buffer_size=1 << 20)), raw
    return raw, raw


class _ZstdStream(io.RawIOBase):
    """Zstandard frames, one after another; a file cut within a frame is an error.

    `zstandard`'s own stream reader takes a cut file for a complete one.
    """

    def __init__(self, raw: BinaryIO, path: Path) -> None:
        import zstandard

        self._raw, self._path = raw, path
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
                raise OSError(f"not valid Zstandard data: {error}") from error
            self._input = b""
            if self._frame.eof:
                self._input, self._frame = self._frame.unused_data, None
        count = min(len(buffer), len(self._output))
        buffer[:count] = self._output[:count]
        self._output = self._output[count:]
        return count
