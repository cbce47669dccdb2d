"""Reading and writing Megatron's torch_dist checkpoints tensor by tensor, in one process.

`megatron.core.dist_checkpointing` wants all tensors of a save in memory and a process group. The
files are torch's distributed checkpoints, whose planner may make each tensor when it is written.
"""

from __future__ import annotations

import io
import warnings
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.mapping import ShardedObject
from torch import Tensor
from torch.distributed.checkpoint.default_planner import create_default_global_save_plan
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    LoadPlanner,
    ReadItem,
    SavePlan,
    SavePlanner,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from megatron_ext.exceptions import CheckpointError

CHECKPOINT_VERSION = (
    3.0  # of Megatron's training checkpoints: no reordering of queries, keys, values
)
# The parts of a GPT model in a checkpoint; the rest is optimizer and random state.
MODEL_KEYS = ("embedding.", "decoder.", "output_layer.")


@dataclass(frozen=True)
class LazyTensor:
    """A tensor of a checkpoint, or one layer of a stacked one, that is made when it is written.

    Attributes:
        key: name in the checkpoint.
        layer: index and number of layers, `None` if the tensor is not stacked.
        shape: without the axis of the layers.
        make: makes a tensor of this shape.
    """

    key: str
    layer: tuple[int, int] | None
    shape: tuple[int, ...]
    make: Callable[[], Tensor]

    def write_item(self, dtype: torch.dtype) -> WriteItem:
        """What the planner says of it."""
        stacked = self.layer is not None
        offsets = ((self.layer[0],) if self.layer else ()) + (0,) * len(self.shape)
        sizes = ((1,) if stacked else ()) + self.shape
        whole = ((self.layer[1],) if self.layer else ()) + self.shape
        return WriteItem(
            index=MetadataIndex(self.key, offsets),
            type=WriteItemType.SHARD,
            tensor_data=TensorWriteData(
                chunk=ChunkStorageMetadata(offsets=torch.Size(offsets), sizes=torch.Size(sizes)),
                properties=TensorProperties(dtype=dtype),
                size=torch.Size(whole),
            ),
        )


class _LazyPlanner(SavePlanner):
    """Plans from descriptions; a tensor exists from when it is asked for until it is written."""

    def __init__(
        self, tensors: Sequence[LazyTensor], objects: Mapping[str, Any], *, dtype: torch.dtype
    ) -> None:
        self._tensors = [(tensor, tensor.write_item(dtype)) for tensor in tensors]
        self._by_index = {item.index: tensor for tensor, item in self._tensors}
        self._objects = objects
        self._dtype = dtype

    def set_up_planner(
        self, state_dict: Any, storage_meta: Any = None, is_coordinator: bool = False
    ) -> None:
        """All is known already."""

    def create_local_plan(self) -> SavePlan:
        """Objects, then tensors in the given order."""
        objects = [
            WriteItem(index=MetadataIndex(name), type=WriteItemType.BYTE_IO)
            for name in self._objects
        ]
        return SavePlan([*objects, *(item for _, item in self._tensors)])

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        """That of the only process."""
        return create_default_global_save_plan(all_plans)

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        """Nothing is left to decide."""
        return new_plan

    def resolve_data(self, write_item: WriteItem) -> Tensor | io.BytesIO:
        """Make what is about to be written."""
        if write_item.type == WriteItemType.BYTE_IO:
            stream = io.BytesIO()
            torch.save(self._objects[write_item.index.fqn], stream)
            return stream
        description = self._by_index[write_item.index]
        tensor = description.make().to(self._dtype)
        assert tuple(tensor.shape) == description.shape, description.key
        return tensor.unsqueeze(0) if description.layer is not None else tensor


def write(
    path: Path,
    tensors: Sequence[LazyTensor],
    *,
    dtype: torch.dtype,
    args: Namespace,
    empty_objects: Sequence[tuple[str, int]] = (),
) -> None:
    """Write one iteration of a checkpoint.

    Memory beyond the tensor being written: torch's writer keeps the last one of each key.

    Args:
        path: folder of the iteration; it is created.
        tensors: what it holds.
        dtype: of all tensors.
        args: arguments of the run, for what loads it.
        empty_objects: keys that layers ask for beside their weights, and the number of layers.
    """
    path.mkdir(parents=True)
    common = {"args": args, "checkpoint_version": CHECKPOINT_VERSION, "iteration": 0}
    objects: dict[str, list[object]] = {_object_key("common_state", 0, 1): [common]}
    for key, layers in empty_objects:
        objects |= {_object_key(key, layer, layers): [None] for layer in range(layers)}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # as intended
        dcp.save(
            {},
            storage_writer=dcp.FileSystemWriter(path),
            planner=_LazyPlanner(tensors, objects, dtype=dtype),
            no_dist=True,
        )
    save_config(CheckpointingConfig("torch_dist"), str(path))


def _object_key(key: str, index: int, count: int) -> str:
    return ShardedObject(key, None, (count,), (index,)).unique_key


class _Into(LoadPlanner):
    """Loads slices of one stored tensor into a given one."""

    def __init__(self, target: Tensor) -> None:
        self._target = target

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        """The part of the target that an item fills."""
        view = self._target
        for axis, (start, size) in enumerate(
            zip(read_item.dest_offsets, read_item.lengths, strict=True)
        ):
            view = view.narrow(axis, start, size)
        return view

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        """It was filled in place."""

    def set_up_planner(self, *args: Any, **kwargs: Any) -> None:
        """All is known already."""

    def create_local_plan(self) -> LoadPlan:
        """Not used: the reader makes the plan."""
        raise NotImplementedError

    def create_global_plan(self, global_plan: list[LoadPlan]) -> list[LoadPlan]:
        """Not used: there is one process."""
        raise NotImplementedError

    def finish_plan(self, central_plan: LoadPlan) -> LoadPlan:
        """Not used."""
        raise NotImplementedError

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        """Not used: only tensors are asked for."""
        raise NotImplementedError


class Reader:
    """The tensors of one iteration, whatever layout wrote it.

    Args:
        path: folder of the iteration.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._reader = dcp.FileSystemReader(path)
        self._metadata = self._reader.read_metadata()
        self._reader.set_up_storage_reader(self._metadata, is_coordinator=True)

    def keys(self, prefixes: tuple[str, ...]) -> set[str]:
        """Names of the tensors that start with any of these."""
        return {key for key, entry in self._tensors() if key.startswith(prefixes)}

    def _tensors(self) -> list[tuple[str, TensorStorageMetadata]]:
        entries = self._metadata.state_dict_metadata.items()
        return [(key, entry) for key, entry in entries if isinstance(entry, TensorStorageMetadata)]

    def describe(self, key: str) -> tuple[tuple[int, ...], torch.dtype]:
        """Shape, with the axis of the layers, and dtype of a tensor.

        Raises:
            CheckpointError: there is none of this name.
        """
        entry = self._metadata.state_dict_metadata.get(key)
        if not isinstance(entry, TensorStorageMetadata):
            raise CheckpointError(f"{self.path}: expected a tensor {key}, found none")
        return tuple(entry.size), entry.properties.dtype

    def read(self, key: str, *, layer: int | None = None) -> Tensor:
        """Read a tensor, or one layer of a stacked one, in its own dtype.

        Reads the stored shards that overlap with it one after another.
        """
        shape, dtype = self.describe(key)
        offsets, sizes = (0,) * len(shape), shape
        if layer is not None:
            offsets, sizes = (layer, *offsets[1:]), (1, *shape[1:])
        entry = self._metadata.state_dict_metadata[key]
        assert isinstance(entry, TensorStorageMetadata)
        chunk = ChunkStorageMetadata(offsets=torch.Size(offsets), sizes=torch.Size(sizes))
        items = create_read_items_for_chunk_list(key, entry, [chunk])
        stored = sum(torch.Size(item.lengths).numel() for item in items)
        if stored != torch.Size(sizes).numel():
            raise CheckpointError(f"{self.path}: expected all of {key}, found parts missing")
        tensor = torch.empty(sizes, dtype=dtype)
        self._reader.read_data(LoadPlan(items), _Into(tensor)).wait()
        return tensor if layer is None else tensor.squeeze(0)
