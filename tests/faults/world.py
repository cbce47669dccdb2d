"""The run that faults are done to, what it leaves when nothing disturbs it, and how runs are compared."""

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp
from megatron.core import dist_checkpointing

from megatron_ext.analysis.scalars import read_scalars
from megatron_ext.checkpoint import safe_load
from tests.faults.processes import Attempt
from tests.helpers.entry import METRICS
from tests.helpers.tiny import Tiny

STEPS, INTERVAL = 8, 2
LOGGED = (*METRICS, "grad-norm", "learning-rate")
SHARDED = ("--use-distributed-optimizer", "--dist-ckpt-optim-fully-reshardable")
LAYOUTS: Mapping[str, tuple[object, ...]] = {
    "TP 2": ("--tensor-model-parallel-size", 2),
    "PP 2": ("--pipeline-model-parallel-size", 2),
    "DP 2": (),
    "DP 2, distributed optimizer": SHARDED,
    "DP 2, bf16, overlapped": (
        *(*SHARDED, "--bf16", "--overlap-grad-reduce", "--overlap-param-gather"),
        *("--ddp-bucket-size", 5000),
    ),
    "PP 2, interleaved": (
        *("--pipeline-model-parallel-size", 2, "--num-virtual-stages-per-pipeline-rank", 2),
    ),
    "TP 2, asynchronous saves": ("--tensor-model-parallel-size", 2, "--async-save"),
}


@dataclass(frozen=True)
class Place:
    """Where one run writes."""

    directory: Path

    @property
    def save(self) -> Path:
        """Its checkpoints."""
        return self.directory / "checkpoints"

    @property
    def logs(self) -> Path:
        """Its TensorBoard directory."""
        return self.directory / "tensorboard"

    @property
    def cache(self) -> Path:
        """Its index of the data sets."""
        return self.directory / "cache"

    def folder(self, iteration: int) -> Path:
        """The folder of a checkpoint."""
        return self.save / f"iter_{iteration:07d}"

    def latest(self) -> int:
        """The iteration that the tracker file names; 0 without one."""
        try:
            return int((self.save / "latest_checkpointed_iteration.txt").read_text())
        except (FileNotFoundError, ValueError):
            return 0

    def remove(self) -> None:
        """Make room."""
        shutil.rmtree(self.directory, ignore_errors=True)


def command(tiny: Tiny, place: Place, layout: str) -> tuple[object, ...]:
    """The very same for the first start and for each restart."""
    return tiny.objective(
        *("--train-iters", STEPS, "--save-interval", INTERVAL, "--lr", 1e-3, "--min-lr", 1e-4),
        *("--pretrained-checkpoint", tiny.base, "--reference-load", tiny.reference),
        *("--load", place.save, "--save", place.save, "--tensorboard-dir", place.logs),
        *("--data-cache-path", place.cache, "--allow-data-overlap", *LAYOUTS[layout]),
    )


@dataclass(frozen=True)
class Result:
    """What a finished run leaves.

    Attributes:
        items: by name, offset and part, the bytes of all tensors and objects of the last checkpoint: weights,
            optimizer state, random states.
        common: the rest of it, but the arguments.
        losses: by tag and step.
    """

    items: dict[Any, bytes]
    common: str
    losses: dict[str, dict[int, float]]

    def difference(self, other: "Result") -> str | None:
        """The first difference, in words."""
        if self.items.keys() != other.items.keys():
            return f"items {sorted(map(str, self.items.keys() ^ other.items.keys()))[:3]}"
        for key, value in self.items.items():
            if value != other.items[key]:
                return f"checkpoint item {key}"
        if self.common != other.common:
            return f"common state: {self.common} against {other.common}"
        for tag, steps in self.losses.items():
            if steps != other.losses.get(tag):
                return f"logged {tag}: {steps} against {other.losses.get(tag)}"
        return None


def read_result(place: Place) -> Result:
    """Read the last checkpoint and the logged losses of a finished run."""
    folder = place.folder(STEPS)
    safe_load.enable()
    stored = dcp.FileSystemReader(folder).read_metadata().storage_data
    files = {info.relative_path: b"" for info in stored.values()}
    for name in files:
        files[name] = (folder / name).read_bytes()
    items = {
        key: files[info.relative_path][info.offset : info.offset + info.length]
        for key, info in stored.items()
        if not key.fqn.startswith("common_state")
    }
    common = dist_checkpointing.load_common_state_dict(str(folder))
    scalars = read_scalars(place.logs)
    return Result(
        items,
        repr({key: common[key] for key in sorted(common) if key != "args"}),
        {tag: dict(scalars[tag]) for tag in LOGGED},
    )


def undisturbed(tiny: Tiny, place: Place, layout: str) -> Result:
    """Run to the end without a fault."""
    attempt = Attempt(command(tiny, place, layout), torchrun=False)
    attempt.wait(120)
    assert attempt.code == 0, attempt.text()[-6000:]
    result = read_result(place)
    assert all(len(steps) == STEPS for steps in result.losses.values())
    return result
