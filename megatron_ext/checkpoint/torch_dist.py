"""Reading and writing Megatron's torch_dist checkpoints tensor by tensor, in one process.

`megatron.core.dist_checkpointing` wants all tensors of a save in memory and a process group. The
files are torch's distributed checkpoints, whose planner may make each tensor when it is written.
"""

from __future__ import annotations

import dataclasses
import io
import itertools
import warnings
from argparse import Namespace
from collections import defaultdict
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
    """A tensor of a checkpoint, or one of a stacked one, that is made when it is written.

    Attributes:
        key: name in the checkpoint.
        place: of a stacked tensor, index and size of each leading axis, such as the layer and the expert.
        shape: without these axes.
        make: makes a tensor of this shape.
    """

    key: str
    place: tuple[tuple[int, int], ...]
    shape: tuple[int, ...]
    make: Callable[[], Tensor]

    def write_item(self, dtype: torch.dtype) -> WriteItem:
        """What the planner says of it."""
        offsets = (*(index for index, _ in self.place), *(0 for _ in self.shape))
        sizes = (*(1 for _ in self.place), *self.shape)
        whole = (*(size for _, size in self.place), *self.shape)
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
        return tensor[(None,) * len(description.place)]


def write(
    path: Path,
    tensors: Sequence[LazyTensor],
    *,
    dtype: torch.dtype,
    args: Namespace,
    empty_objects: Sequence[tuple[str, tuple[int, ...]]] = (),
) -> None:
    """Write one iteration of a checkpoint.

    Memory beyond the tensor being written: torch's writer keeps the last one of each key.

    Args:
        path: folder of the iteration; it is created.
        tensors: what it holds.
        dtype: of all tensors.
        args: arguments of the run, for what loads it.
        empty_objects: keys that layers ask for beside their weights, and the sizes of the axes that these
            are stacked on.
    """
    path.mkdir(parents=True)
    common = {"args": args, "checkpoint_version": CHECKPOINT_VERSION, "iteration": 0}
    objects: dict[str, list[object]] = {_object_key("common_state", (0,), (1,)): [common]}
    for key, stack in empty_objects:
        places = itertools.product(*map(range, stack))
        objects |= {_object_key(key, place, stack): [None] for place in places}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # as intended
        dcp.save(
            {},
            storage_writer=dcp.FileSystemWriter(path),
            planner=_LazyPlanner(tensors, objects, dtype=dtype),
            no_dist=True,
        )
    save_config(CheckpointingConfig("torch_dist"), str(path))


def _object_key(key: str, place: tuple[int, ...], stack: tuple[int, ...]) -> str:
    return ShardedObject(key, None, stack, place).unique_key


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
        self._by_layer: dict[str, defaultdict[int, list[ChunkStorageMetadata]]] = {}

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

    def read(self, key: str, *place: int) -> Tensor:
        """Read a tensor, or one of a stacked one, in its own dtype.

        Reads the stored shards that overlap with it one after another.

        Args:
            key: name in the checkpoint.
            *place: its indices on the leading axes, such as the layer and the expert.
        """
        shape, dtype = self.describe(key)
        inner = shape[len(place) :]
        offsets, sizes = (*place, *(0 for _ in inner)), (*(1 for _ in place), *inner)
        entry = self._shards(key, *place[:1])
        chunk = ChunkStorageMetadata(offsets=torch.Size(offsets), sizes=torch.Size(sizes))
        items = create_read_items_for_chunk_list(key, entry, [chunk])
        stored = sum(torch.Size(item.lengths).numel() for item in items)
        if stored != torch.Size(sizes).numel():
            raise CheckpointError(f"{self.path}: expected all of {key}, found parts missing")
        tensor = torch.empty(sizes, dtype=dtype)
        self._reader.read_data(LoadPlan(items), _Into(tensor)).wait()
        return tensor.view(inner)

    def _shards(self, key: str, *layer: int) -> TensorStorageMetadata:
        """The stored shards of a tensor, or those of one layer: experts have many, and each is read alone."""
        entry = self._metadata.state_dict_metadata[key]
        assert isinstance(entry, TensorStorageMetadata)
        if not layer:
            return entry
        if key not in self._by_layer:
            by_layer: defaultdict[int, list[ChunkStorageMetadata]] = defaultdict(list)
            for chunk in entry.chunks:
                for index in range(chunk.offsets[0], chunk.offsets[0] + chunk.sizes[0]):
                    by_layer[index].append(chunk)
            self._by_layer[key] = by_layer
        return dataclasses.replace(entry, chunks=self._by_layer[key][layer[0]])
