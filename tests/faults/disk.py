"""A small disk that can be made full: a tmpfs where this user may mount one, else a limit on files' sizes."""

import contextlib
import errno
import os
import resource
import subprocess
from collections.abc import Iterator
from pathlib import Path

SIZE = 64 << 20


class Disk:
    """Mounts at `directory`, or says in `name` that it could not."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        directory.mkdir(parents=True, exist_ok=True)
        options = ["-t", "tmpfs", "-o", f"size={SIZE}", "tmpfs", str(directory)]
        self.mounted = (
            os.geteuid() == 0
            and subprocess.run(["mount", *options], capture_output=True).returncode == 0
        )
        self.name = "a small tmpfs" if self.mounted else "RLIMIT_FSIZE"
        # Of a save in the product's words: torch's are "unexpected pos 704 vs 598".
        self.cause = (
            r"error.*--save \S+: the checkpoint .* could not be written, with [\d.]+ MiB free|"
            + os.strerror(errno.ENOSPC if self.mounted else errno.EFBIG)
        )

    @contextlib.contextmanager
    def nearly_full(self, free: int) -> Iterator[None]:
        """Leave some bytes, for all files together or, without a mount, for each."""
        if self.mounted:
            state = os.statvfs(self.directory)
            ballast = self.directory / "ballast"
            ballast.write_bytes(bytes(max(0, state.f_bavail * state.f_frsize - free)))
            try:
                yield
            finally:
                ballast.unlink()
            return
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (free // 4, before[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    def close(self) -> None:
        """Unmount."""
        if self.mounted:
            subprocess.run(["umount", str(self.directory)], check=True)
