"""CUDA's streams and events where everything runs in the order of its calls."""

from __future__ import annotations

import time
from typing import Any


class Stream:
    """Order on one stream is the order of the calls, so every wait has already happened."""

    cuda_stream = 0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def wait_stream(self, stream: Any) -> None:
        """Nothing to wait for."""

    def wait_event(self, event: Any) -> None:
        """Nothing to wait for."""

    def synchronize(self) -> None:
        """Nothing to wait for."""

    def query(self) -> bool:
        """Whether all is done."""
        return True

    def record_event(self, event: Any = None) -> Any:
        """Record an event, a new one by default."""
        event = event or Event()
        event.record()
        return event


class Event:
    """A point in wall-clock time."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._seconds = 0.0

    def record(self, stream: Any = None) -> None:
        """Take the time."""
        self._seconds = time.perf_counter()

    def wait(self, stream: Any = None) -> None:
        """Nothing to wait for."""

    def synchronize(self) -> None:
        """Nothing to wait for."""

    def query(self) -> bool:
        """Whether all is done."""
        return True

    def elapsed_time(self, end: Event) -> float:
        """Milliseconds, as CUDA's events give."""
        return (end._seconds - self._seconds) * 1e3
