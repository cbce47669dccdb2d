"""Which kernels torch's attention may choose from, for the time of a call.

The choice is the process's, and others attend in it too (a model of `transformers` in an evaluation may need
the very kernel that is ruled out here), so it is made anew around each call, and taken back. torch's own
`sdpa_kernel` takes 20 to 38 us of the host for that (benchmarks/NOTES.md), nearly all of it to convert its
enumeration; here that is done once for each choice.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import cache
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

_C: Any = torch._C
# As torch's functions name them.
_NAMES = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "mem_efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
    "overrideable": SDPBackend.OVERRIDEABLE,
}
_GETTERS = [f"_get_{name}_sdp_enabled" for name in _NAMES]
_SETTERS = [f"_set_sdp_use_{name}" for name in _NAMES]
_PRIVATE = (*_GETTERS, *_SETTERS, "_get_sdp_priority_order", "_set_sdp_priority_order")
# A torch that has other functions, or more kernels, is asked in public.
KNOWN = all(hasattr(_C, name) for name in _PRIVATE) and len(SDPBackend.__members__) == 6
_get: list[Callable[[], bool]] = [getattr(_C, name) for name in _GETTERS if KNOWN]
_set: list[Callable[[bool], None]] = [getattr(_C, name) for name in _SETTERS if KNOWN]


@cache
def _converted(backends: tuple[SDPBackend, ...]) -> tuple[list[bool], list[int]]:
    """Which are on, in the order of `_NAMES`, and their numbers in the given order."""
    return [kind in backends for kind in _NAMES.values()], [kind.value for kind in backends]


class _Only:
    """What `only` gives where torch is known."""

    def __init__(self, backends: tuple[SDPBackend, ...]) -> None:
        self._wanted, self._first = _converted(backends)

    def __enter__(self) -> None:
        self._before = [get() for get in _get]
        self._order: list[int] = _C._get_sdp_priority_order()
        others = (kind for kind in self._order if kind not in self._first)
        _C._set_sdp_priority_order([*self._first, *others])
        _switch(self._before, self._wanted)

    def __exit__(self, *_: object) -> None:
        _C._set_sdp_priority_order(self._order)
        _switch(self._wanted, self._before)


def _switch(before: list[bool], after: list[bool]) -> None:
    for setter, old, new in zip(_set, before, after, strict=True):
        if old != new:
            setter(new)


def only(backends: tuple[SDPBackend, ...]) -> AbstractContextManager[None]:
    """Let torch's attention choose from these alone.

    Args:
        backends: The first that can compute a call does; each at most once.

    Returns:
        A context, after which the choice is the one from before.
    """
    return _Only(backends) if KNOWN else sdpa_kernel([*backends], set_priority=True)
