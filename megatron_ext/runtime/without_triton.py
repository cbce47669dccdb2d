"""Megatron-Core where torch comes without Triton: macOS, and torch's builds for CPUs alone.

Imports nothing but the standard library: every import of this package comes by here.
"""

import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

# Of all modules that an import of Megatron-Core 0.19.2 reaches, only this one does not ask whether there is
# a Triton. Its kernels run with --moe-paged-stash alone, which Megatron refuses without HybridEP or NCCL EP:
# packages for GPUs, where there is one.
_UNGUARDED = "megatron.core.transformer.moe.ops.paged_stash"


def let_megatron_import() -> None:
    """Have Megatron-Core find a stand-in where it would fail; does nothing where there is a Triton."""
    if importlib.util.find_spec("triton") is None:
        sys.meta_path.insert(0, _Finder())


class _Finder(MetaPathFinder, Loader):
    """Finds the stand-in, when Megatron asks for it and not before."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        return ModuleSpec(fullname, self) if fullname == _UNGUARDED else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _StandIn(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        pass


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
