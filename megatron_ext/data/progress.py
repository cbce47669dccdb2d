"""Progress of preprocessing: a bar on a terminal, a line now and then elsewhere."""

import logging
import sys
import time
from types import TracebackType
from typing import Self

from tqdm import tqdm

logger = logging.getLogger(__name__)


class Progress:
    """Shows how far through the input files a run is, with documents and tokens.

    Args:
        total_bytes: Size of the input files as stored.
        log_interval: Documents between two log lines where standard error is no terminal.
    """

    def __init__(self, total_bytes: int, log_interval: int) -> None:
        self._terminal = sys.stderr.isatty()
        self._bar = tqdm(
            total=total_bytes,
            unit="B",
            unit_scale=True,
            disable=not self._terminal,
            desc="encoding",
        )
        self._total = total_bytes
        self._done = 0
        self._interval = log_interval
        self._next_line = log_interval
        self._start = time.monotonic()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Ends the bar."""
        self._bar.close()

    def update(self, consumed: int, documents: int, tokens: int) -> None:
        """Reports `consumed` further bytes of input, and documents and tokens so far."""
        self._done += consumed
        self._bar.update(consumed)
        self._bar.set_postfix(documents=documents, tokens=f"{tokens / 1e6:.1f}M", refresh=False)
        if not self._terminal and documents >= self._next_line:
            self._next_line = (documents // self._interval + 1) * self._interval
            rate = self._done / 1e6 / max(time.monotonic() - self._start, 1e-9)
            logger.info(
                "%d documents, %.1fM tokens, %.1f of %.1f MB read, %.1f MB/s",
                *(documents, tokens / 1e6, self._done / 1e6, self._total / 1e6, rate),
            )
