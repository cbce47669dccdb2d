"""A model's weights as safetensors files: one, or several with an index."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from megatron_ext.exceptions import CheckpointError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


class SafetensorsReader:
    """Tensors by name. They are views of mapped files, which the system reads and drops as it likes.

    Args:
        folder: folder of a model.

    Raises:
        CheckpointError: there are no safetensors files, or one is missing or broken.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._stack = ExitStack()
        self._files: dict[str, Any] = {}
        try:
            for name in self._file_names():
                # Of a file that cannot be opened safetensors says that there is none.
                (folder / name).open("rb").close()
                opened = self._stack.enter_context(safe_open(folder / name, framework="pt"))
                self._files |= dict.fromkeys(opened.keys(), opened)
        except (OSError, SafetensorError, ValueError) as error:
            self._stack.close()
            raise CheckpointError(f"{folder}: weights cannot be read: {error}") from error
        except BaseException:
            self._stack.close()
            raise

    def _file_names(self) -> list[str]:
        if (self.folder / INDEX).is_file():
            return _named_files(self.folder / INDEX)
        if (self.folder / SINGLE).is_file():
            return [SINGLE]
        raise CheckpointError(f"{self.folder}: expected {SINGLE} or {INDEX}, found neither")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._files.clear()
        self._stack.close()

    def names(self) -> set[str]:
        """Names of all tensors."""
        return set(self._files)

    def describe(self, name: str) -> tuple[tuple[int, ...], str]:
        """Shape, and dtype as the files name it, without reading the tensor."""
        entry = self._files[name].get_slice(name)
        return tuple(entry.get_shape()), entry.get_dtype()

    def read(self, name: str) -> Tensor:
        """The tensor, in its own dtype."""
        tensor: Tensor = self._files[name].get_tensor(name)
        return tensor


def _named_files(path: Path) -> list[str]:
    """The files that an index names."""
    try:
        index = json.loads(path.read_text())
    except RecursionError as error:
        raise ValueError(f"{path.name} is nested too deeply") from error
    places = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(places, dict) or not all(isinstance(p, str) for p in places.values()):
        raise ValueError(f"{path.name}: expected the file of each tensor under weight_map")
    return sorted(set(places.values()))


def write_safetensors(
    folder: Path,
    shapes: Mapping[str, tuple[int, ...]],
    tensors: Iterable[tuple[str, Tensor]],
    *,
    dtype: torch.dtype,
    max_shard_bytes: int,
) -> None:
    """Write a model's weights, one file at a time in memory.

    Args:
        folder: where to.
        shapes: of every tensor, in order; the files are planned from them.
        tensors: the tensors in the same order.
        dtype: of all of them.
        max_shard_bytes: size of a file; a larger tensor gets a file of its own.
    """
    shards: list[dict[str, int]] = [{}]
    for name, shape in shapes.items():
        size = torch.Size(shape).numel() * dtype.itemsize
        if shards[-1] and sum(shards[-1].values()) + size > max_shard_bytes:
            shards.append({})
        shards[-1][name] = size
    count = len(shards)
    files = [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
    stream = iter(tensors)
    for file, shard in zip(files if count > 1 else [SINGLE], shards, strict=True):
        content = {}
        for name in shard:
            found, tensor = next(stream)
            assert found == name, (found, name)
            assert tuple(tensor.shape) == shapes[name], name
            content[name] = tensor.to(dtype)
        save_file(content, folder / file, metadata={"format": "pt"})
    if count > 1:
        places = {name: file for file, shard in zip(files, shards, strict=True) for name in shard}
        total = sum(sum(shard.values()) for shard in shards)
        index = {"metadata": {"total_size": total}, "weight_map": places}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
