"""Files that appear under their final names complete, or not at all.

Everything is written to `NAME.partial` beside its destination, flushed to the disk and renamed at
the end. An exclusive lock on the partial file keeps a second run from writing to the same
destination; a partial file that a killed run left behind is unlocked, and the next run simply takes
it over, in a file of its own: where a lock was lost, as over the nodes of some network file systems, the
other run finds out before it publishes anything.
"""

import contextlib
import errno
import fcntl
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

from megatron_ext.exceptions import ConfigError, DataError

PARTIAL_SUFFIX = ".partial"
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# As of Lustre mounted without flock, and of NFS whose lock manager does not run.
_NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOLCK)


def free_mib(folder: str | Path) -> float:
    """Room on the disk of a folder, or of where it would be made, in MiB."""
    path = Path(folder).absolute()
    while not path.is_dir() and path != path.parent:
        path = path.parent
    return shutil.disk_usage(path).free / 2**20


class AtomicFiles:
    """A set of files that is published together, in the given order.

    Readers take the last path for the mark of a complete set: it is the last to appear, and the
    first to go when an older set is replaced.

    Args:
        paths: Final paths, the most telling one last.
        overwrite: Whether files that exist already may be replaced.

    Raises:
        ConfigError: A path exists and `overwrite` is false, or it is a folder.
        OSError: The directory cannot be written.
        DataError: Another process is writing to the same destination, or its file system has no locks.
    """

    def __init__(self, paths: Sequence[Path], *, overwrite: bool = False) -> None:
        refuse_existing(paths, overwrite=overwrite)
        self._paths, self._overwrite = list(paths), overwrite
        self._streams: dict[Path, BinaryIO] = {}
        try:
            for path in self._paths:
                path.parent.mkdir(parents=True, exist_ok=True)
                self._streams[path] = _open_locked(path)
            # Another run may have published between the look and the lock.
            refuse_existing(paths, overwrite=overwrite)
        except BaseException:
            self.discard()
            raise

    def __getitem__(self, path: Path) -> BinaryIO:
        """The open stream whose content becomes `path`."""
        return self._streams[path]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Removes whatever was not published; a full disk, whose error names no file, is named."""
        folder = self._paths[0].parent
        full = isinstance(exc, OSError) and exc.errno in _FULL and exc.filename is None
        free = free_mib(folder) if full else 0.0
        self.discard()
        if full:
            raise DataError(
                f"{self._paths[0]} and what belongs to it cannot be written, with {free:.1f} MiB free on "
                f"its disk: {exc}"
            ) from exc

    def restart(self) -> None:
        """Empties all files."""
        for stream in self._streams.values():
            stream.seek(0)
            stream.truncate()

    def commit(self) -> None:
        """Publishes all files: afterwards they are on the disk under their final names.

        Raises:
            DataError: Another run has taken over the partial files, whose locks were lost.
            ConfigError: It has published its own meanwhile.
            OSError: The disk is full or a rename failed; no file of the set is left then.
        """
        for stream in self._streams.values():
            stream.flush()
            os.fsync(stream.fileno())
        for path, stream in self._streams.items():
            if not _is_open(_partial(path), stream.fileno()):
                raise DataError(
                    f"{_partial(path)}: expected the file that this run writes, found that another run has "
                    "taken it over; locks do not reach from one to the other on this file system"
                )
        refuse_existing(self._paths, overwrite=self._overwrite)
        # An old index beside new tokens would pass for a complete set: it goes before anything
        # changes.
        for path in reversed(self._paths):
            path.unlink(missing_ok=True)
        published: list[Path] = []
        try:
            for path in self._paths:
                os.replace(_partial(path), path)
                published.append(path)
        except BaseException:
            for path in reversed(published):
                path.unlink(missing_ok=True)
            raise
        for directory in {path.parent for path in self._paths}:
            fsync(directory)
        self._close()

    def discard(self) -> None:
        """Removes the partial files that are still open; does nothing after `commit`."""
        for path, stream in self._streams.items():
            # Removed before it is closed, which gives up the lock: nobody else's file can be hit.
            if _is_open(_partial(path), stream.fileno()):
                _partial(path).unlink(missing_ok=True)
        self._close()

    def _close(self) -> None:
        for stream in self._streams.values():
            # A buffer that a full disk refused would raise a second time here.
            with contextlib.suppress(OSError):
                stream.close()
        self._streams.clear()


def write_atomically(path: Path, data: bytes, *, overwrite: bool = False) -> None:
    """Writes one file through `AtomicFiles`."""
    with AtomicFiles([path], overwrite=overwrite) as files:
        files[path].write(data)
        files.commit()


def replace_file(path: Path, data: bytes) -> None:
    """Writes a small file in the place of another; no reader sees half of it.

    Takes no lock: for what one process of a run writes, on whatever file system its checkpoints are.

    Raises:
        OSError: The disk is full, or the folder cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with _partial(path).open("wb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(_partial(path), path)


def refuse_existing(paths: Sequence[Path], *, overwrite: bool = False) -> None:
    """Refuses, before any work, what `AtomicFiles` would refuse after it.

    Raises:
        ConfigError: A path exists and `overwrite` is false, or it is a folder.
    """
    folder = next((path for path in paths if path.is_dir()), None)
    if folder is not None:
        raise ConfigError(f"{folder}: expected a file to write, or nothing, found a folder")
    existing = [path for path in paths if path.exists()]
    if existing and not overwrite:
        raise taken(existing[0])


def check_place(path: str | Path, *, flag: str, is_folder: bool = False) -> None:
    """Refuses, before any work, an output below a file, or where nothing can be written.

    Args:
        path: What will be written; folders above it are made.
        flag: That named it, for the message.
        is_folder: Whether files will be written into it, and it may be there.

    Raises:
        ConfigError: Names the flag and what is in the way.
    """
    wanted = Path(path).absolute()
    above = (wanted, *wanted.parents) if is_folder else wanted.parents
    nearest = next(folder for folder in above if os.path.lexists(folder))
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        what = "cannot be written" if nearest.is_dir() else "is a file"
        raise ConfigError(
            f"{flag} {path}: expected a place to write to, found that {nearest} {what}"
        )


def taken(path: Path) -> ConfigError:
    """What to raise where something exists that may not be replaced."""
    return ConfigError(f"{path} exists: give --overwrite to replace it, or another output name")


def lock(file: int | BinaryIO, path: Path, *, wait: bool = False) -> None:
    """Takes the exclusive lock of an open file; it lasts until that is closed.

    Args:
        file: Descriptor or stream.
        path: Of the file, for messages.
        wait: Whether to wait while another process holds it.

    Raises:
        BlockingIOError: Another process holds it.
        DataError: The file system has no locks.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        raise DataError(
            f"{path} cannot be locked ({error.strerror}): its file system is mounted without flock; mount "
            "with -o flock (localflock locks on one node only), or write to another one"
        ) from error


def _partial(path: Path) -> Path:
    return path.with_name(path.name + PARTIAL_SUFFIX)


def _is_open(path: Path, descriptor: int) -> bool:
    """Whether a path is still that of an open file."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _open_locked(path: Path) -> BinaryIO:
    """Makes an empty partial file that this process alone holds."""
    partial = _partial(path)
    while True:
        try:
            descriptor = os.open(partial, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
            made = True
        except FileExistsError:
            try:
                descriptor, made = os.open(partial, os.O_RDWR | os.O_CLOEXEC), False
            except FileNotFoundError:
                continue
        try:
            lock(descriptor, partial)
            # Between our open and our lock another process may have renamed, removed or replaced the file.
            if _is_open(partial, descriptor):
                if made:
                    return os.fdopen(descriptor, "wb", buffering=1 << 20)
                partial.unlink()  # left behind by a run that was killed
        except BlockingIOError:
            os.close(descriptor)
            raise DataError(f"another run is writing {path} (it holds {partial})") from None
        except DataError:
            if made:
                partial.unlink(missing_ok=True)
            os.close(descriptor)
            raise
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def fsync(path: Path) -> None:
    """Has a file's content, or the names in a directory, reach the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
