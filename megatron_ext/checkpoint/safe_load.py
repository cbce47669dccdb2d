"""A checkpoint from elsewhere is data: reading it never runs code.

Megatron loads the non-tensor part of a checkpoint through torch's distributed checkpoints, and those
(torch 2.13) unpickle without limits in two places: the file `.metadata` (`FileSystemReader.read_metadata`)
and every object beside the tensors (`DefaultLoadPlanner.load_bytes` passes `weights_only=False`).

Transformer Engine pickles what fp8's delayed scaling has learnt, an `_extra_state` of each layer. Before 2.20
it unpickles whatever it is given; since then it ends every resume in an error, unless told to do the same.
"""

from __future__ import annotations

import contextlib
import gc
import hashlib
import io
import os
import pickle
import re
import sys
import traceback
from collections.abc import Iterator
from typing import IO, Any, ClassVar

import torch
from torch.distributed.checkpoint.metadata import TensorProperties

from megatron_ext.exceptions import ConfigError

_FORCE, _FORBID = "TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"

# The modules of Transformer Engine that unpickle extra states, and by what they are told to.
_READERS = ("transformer_engine.pytorch.module.base", "transformer_engine.pytorch.ops.op")
_ALLOW = "NVTE_ALLOW_UNSAFE_PICKLE_EXTRA_STATE"

_CHECKPOINT = "torch.distributed.checkpoint"
# What the metadata of a checkpoint consists of, besides Python's containers.
_METADATA_CLASSES = frozenset(
    {
        *((f"{_CHECKPOINT}.filesystem", name) for name in ("_StorageInfo", "_StoragePrefix")),
        *(
            (f"{_CHECKPOINT}.metadata", name)
            for name in (
                *("BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex"),
                *("StorageMeta", "TensorProperties", "TensorStorageMetadata"),
                "_MEM_FORMAT_ENCODING",
            )
        ),
        *(
            (f"{_CHECKPOINT}.planner", name)
            for name in ("SavePlan", "TensorWriteData", "WriteItem", "WriteItemType")
        ),
        ("torch", "Size"),
        ("torch.serialization", "_get_layout"),
        ("collections", "OrderedDict"),
        ("pathlib", "PosixPath"),
        ("pathlib._local", "PosixPath"),  # as Python 3.13 writes it
    }
)

# A start reads the metadata of a checkpoint five times over: that of the student, and of the reference.
_KEPT = 2
_known: dict[bytes, bytes] = {}


def enable() -> None:
    """Make every later load of a checkpoint in this process, and in those it starts, a load of data.

    Raises:
        ConfigError: the environment asks for the opposite.
    """
    if os.environ.get(_FORBID, "0").lower() in ("1", "y", "yes", "true"):  # as torch reads it
        raise ConfigError(
            f"{_FORBID}: expected it unset, found {os.environ[_FORBID]}; a checkpoint could run code"
        )
    # Wins over an explicit weights_only=False, which torch's planner passes.
    os.environ[_FORCE] = "1"
    from torch.distributed.checkpoint import filesystem

    setattr(filesystem, "pickle", _MetadataPickle)  # noqa: B010  # the name that its reader looks up


def enable_for_extra_states() -> None:
    """Have Transformer Engine, where it has been imported, read its extra states as data."""
    for name in _READERS:
        if module := sys.modules.get(name):
            module.pickle = _StatePickle  # type: ignore[attr-defined]
            os.environ[_ALLOW] = "1"


class _StatePickle:
    """What these modules use of `pickle`."""

    dumps = staticmethod(pickle.dumps)

    @staticmethod
    def loads(data: bytes) -> Any:
        """Recipes and tensors; Megatron has the list, for its grouped experts."""
        from megatron.core.safe_globals import SafeUnpickler

        return SafeUnpickler(io.BytesIO(data)).load()


def load_metadata(stream: IO[bytes]) -> Any:
    """Read the metadata of a checkpoint.

    Args:
        stream: the open file.

    Raises:
        pickle.UnpicklingError: it is damaged, or refers to anything that metadata do not consist of.
    """
    data = stream.read()
    with _without_collector():
        return _read(data, hashlib.sha256(data).digest())


def _read(data: bytes, key: bytes) -> Any:
    # Each reader may change what it is given, so it is a copy that is kept, of what has been found harmless.
    if known := _known.get(key):
        return pickle.loads(known)
    try:
        found = _MetadataUnpickler(io.BytesIO(data)).load()
    except pickle.UnpicklingError:
        raise
    except Exception as error:  # of whatever kind: what a damaged pickle runs into is not foreseen
        raise pickle.UnpicklingError(f"{type(error).__name__}: {error}") from error
    while len(_known) >= _KEPT:
        del _known[next(iter(_known))]
    _known[key] = pickle.dumps(found)
    return found


@contextlib.contextmanager
def _without_collector() -> Iterator[None]:
    """Do not look for garbage meanwhile: among many new objects that are kept it takes most of the time."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def known() -> dict[bytes, bytes]:
    """By digest, the metadata that this process has found harmless, for :func:`adopt` in another one."""
    return dict(_known)


def adopt(others: dict[bytes, bytes]) -> None:
    """Take what another process of this run has found harmless for that.

    Args:
        others: what its :func:`known` has returned.
    """
    _known.update(others)


def reason(error: BaseException) -> str:
    """One line of what went wrong in a load; torch's own advice is to load with ``weights_only=False``."""
    text = str(error)
    refused = re.search(r"GLOBAL (\S+)", text) if "eights only load failed" in text else None
    if refused:
        return f"refused to load {refused[1]}, which is no data"
    if lines := text.strip().splitlines():
        return lines[-1]
    places = traceback.extract_tb(error.__traceback__)
    where = f" in {places[-1].filename}:{places[-1].lineno}" if places else ""
    return f"{type(error).__name__}{where}"


class _MetadataUnpickler(pickle._Unpickler):
    """Python's own unpickler, not the one in C, which a few bytes can make allocate gigabytes.

    Twice as slow: 1.7 s for the 4 MB of 28,800 shards.
    """

    stack: list[Any]

    def find_class(self, module: str, name: str) -> Any:
        """Look up a class of the list, or one of torch's dtypes."""
        known = (module, name) in _METADATA_CLASSES
        if not known and not (module == "torch" and type(getattr(torch, name, 0)) is torch.dtype):
            raise pickle.UnpicklingError(f"refused to load {module}.{name}, which is no metadata")
        return super().find_class(module, name)

    def load_build(self) -> None:
        """Fill an object; a newer torch may have stored more of a tensor's properties than this one knows."""
        new, state = self.stack[-2:]
        if isinstance(new, TensorProperties) and isinstance(state, tuple):
            self.stack[-1] = state[: len(TensorProperties().__getstate__())]
        build: Any = pickle._Unpickler.dispatch[pickle.BUILD[0]]
        build(self)

    dispatch: ClassVar[dict[int, Any]] = {**pickle._Unpickler.dispatch, pickle.BUILD[0]: load_build}


class _MetadataPickle:
    """What torch's reader and writer of metadata use of the module `pickle`."""

    load = staticmethod(load_metadata)
    dump = staticmethod(pickle.dump)
