"""Megatron-Core where torch comes without Triton: macOS, and torch's builds for CPUs alone.

Imports nothing but the standard library: every import of this package comes by here.
"""

import importlib.util
import sys
from types import ModuleType
from typing import Any

# Of all modules that an import of Megatron-Core 0.19.2 reaches, only this one does not ask whether there is
# a Triton. Its kernels move the tokens of experts, which no model here has.
_UNGUARDED = "megatron.core.transformer.moe.ops.paged_stash"


def let_megatron_import() -> None:
    """Put a stand-in where Megatron-Core would fail for want of Triton; does nothing where there is one."""
    if importlib.util.find_spec("triton") is None:
        sys.modules.setdefault(_UNGUARDED, _StandIn(_UNGUARDED))


class _StandIn(ModuleType):
    """Has every public name; what is called by it, or launched, fails."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Unusable(f"{self.__name__}.{name}")


class _Unusable:
    """A function or a kernel of such a module."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, *_: Any, **__: Any) -> Any:
        raise ImportError(f"{self.name} needs Triton, which is not installed")

    def __getitem__(self, grid: Any) -> Any:  # kernel[grid](...)
        return self()
