"""The plan against Megatron: one rank's model, gradients and optimizer, built without memory.

The entry point's own parser and model config, Megatron's own builder, DDP and optimizer, and
torch's fake process group, which has the real world size and communicates nothing. All tensors are on
the meta device, so a stage of any size takes no memory. Torch, Megatron and a process of its own are
needed: Megatron's arguments and process groups are global.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
import logging
import os
import tempfile
import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from megatron_ext.exceptions import ConfigError
from megatron_ext.planning import flags as entry
from megatron_ext.planning.state import state_bytes

_ENTRY = Path(__file__).resolve().parents[2] / "pretrain_unlearn.py"
_DIRECTORIES = ("--load", "--pretrained-checkpoint", "--reference-load")


def check_rank(
    words: Sequence[str], *, gpus: int, rank: int
) -> tuple[dict[str, Any], ConfigError | None]:
    """Build a rank's part of the run and compare it with the plan.

    Args:
        words: flags of the entry point.
        gpus: ranks of the run.
        rank: the one to build.

    Returns:
        Planned and built numbers by part, and what to raise where they differ.

    Raises:
        ConfigError: the entry point refuses the flags.
        CheckpointError: the run would start from another model, or hold it to another one.
    """
    flags = entry.entry_flags(words)
    arch, layout = entry.architecture(flags), entry.layout(flags, gpus=gpus)
    unlearning = entry.unlearning(flags)
    place = layout.place(rank)
    stage = place.stage
    fused, built = _build(words, gpus=gpus, rank=rank)
    arch = dataclasses.replace(arch, fused_norms=fused)
    if arch.mixture is not None and not fused:  # the torch-native layers keep experts' order
        arch = dataclasses.replace(arch, mixture=dataclasses.replace(arch.mixture, grouped=False))
    planned = {"parameters": arch.stage_parameters(stage, layout.split)}
    planned |= state_bytes(arch, layout, stage, place=place)
    if unlearning is not None and unlearning.reference:
        planned["reference"] = layout.element * planned["parameters"]
    wrong = [
        f"{part} {planned.get(part, 0):,} planned, {built.get(part, 0):,} built"
        for part in planned | built
        if planned.get(part) != built.get(part)
    ]
    failure = None
    if wrong:
        failure = ConfigError(
            f"--check: rank {rank} (stage {stage}): expected the plan's numbers, found "
            + "; ".join(wrong)
        )
    return {"rank": rank, "stage": stage, "planned": planned, "built": built}, failure


def _build(words: Sequence[str], *, gpus: int, rank: int) -> tuple[bool, dict[str, int]]:
    """Whether the layers are Transformer Engine's; parameters, and bytes by part, of a rank of Megatron's."""
    # Megatron describes its arguments and every bucket, and warns of what is not installed.
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    from megatron_ext.runtime import collector

    with collector.paused():
        from megatron_ext.runtime import compat, cpu, optimizer

        cpu.enable()
    compat.check_megatron_version()
    optimizer.enable()
    environment = {
        **{name: str(rank) for name in ("RANK", "LOCAL_RANK")},
        **{"WORLD_SIZE": str(gpus), "LOCAL_WORLD_SIZE": "1"},
    }
    with (
        tempfile.TemporaryDirectory() as directory,
        mock.patch.dict(os.environ, environment),
        compat.command_line([*words, *_replaced(words, directory)], program=str(_ENTRY)),
        contextlib.redirect_stdout(io.StringIO()),
    ):
        from megatron_ext import arguments

        args, config, _ = arguments.parse()
    _check_checkpoints(args)
    try:
        with _no_memory(), contextlib.redirect_stdout(io.StringIO()):
            _start(args, gpus=gpus, rank=rank)
            built = _measure(args, reference=config.needs_reference)
            return args.transformer_impl == "transformer_engine", built
    finally:
        torch.distributed.destroy_process_group()


def _replaced(words: Sequence[str], directory: str) -> list[str]:
    """Flags that stand for checkpoints that do not exist yet, and for a folder that is not to be made."""
    replaced = ["--tensorboard-dir", directory]
    parser = argparse.ArgumentParser(allow_abbrev=False, add_help=False)
    for flag in _DIRECTORIES:
        parser.add_argument(flag, dest=flag)
    for flag, given in vars(parser.parse_known_args(words)[0]).items():
        if given is not None and not Path(given).is_dir():
            replaced += [flag, directory]
    return replaced


def _check_checkpoints(args: argparse.Namespace) -> None:
    """Compare the checkpoints that exist already with the model, as the run would.

    Raises:
        CheckpointError: one is unreadable, or of another model.
    """
    from megatron_ext.checkpoint.inspect import check_architecture, open_checkpoint
    from megatron_ext.checkpoint.source import resolve_start

    names = [flag.lstrip("-").replace("-", "_") for flag in _DIRECTORIES]
    found = {name: getattr(args, name) for name in names}
    # Those that do not exist were stood for; of the ranks only 0 mends a directory, and none is to here.
    there = {
        name: where if where and Path(where).is_dir() else None for name, where in found.items()
    }
    args = argparse.Namespace(**vars(args) | there | {"rank": -1})
    resolve_start(args, required=False)
    if args.reference_load is not None:
        flag = "--reference-load"
        check_architecture(open_checkpoint(args.reference_load, flag=flag), args, flag=flag)


@contextlib.contextmanager
def _no_memory() -> Iterator[None]:
    """Send to the meta device what Megatron allocates on the current device."""
    import megatron.training.models.dist_utils as builder

    tensor_type = torch.Tensor.type

    def type_of(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        # The optimizer knows parameters by the name of their type, torch.cuda.FloatTensor and such.
        answer = tensor_type(self, *args, **kwargs)
        return (
            answer
            if args or kwargs
            else answer.replace(".meta.", ".cuda.").replace(".cuda.cuda.", ".cuda.")
        )

    with (
        mock.patch.object(torch.cuda, "current_device", return_value=torch.device("meta")),
        mock.patch.object(torch.Tensor, "type", type_of),
        # Otherwise a finished model is given memory.
        mock.patch.object(builder, "to_empty_if_meta_device", lambda module, **_: module),
    ):
        yield


def _start(args: Any, *, gpus: int, rank: int) -> None:
    """Megatron's process groups over a process group that communicates nothing."""
    from megatron.core import parallel_state
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.distributed.init_process_group("fake", store=FakeStore(), rank=rank, world_size=gpus)
    parallel_state.initialize_model_parallel(
        args.tensor_model_parallel_size,
        args.pipeline_model_parallel_size,
        args.virtual_pipeline_model_parallel_size,
        context_parallel_size=args.context_parallel_size,
        expert_model_parallel_size=args.expert_model_parallel_size,
        expert_tensor_parallel_size=args.expert_tensor_parallel_size,
        create_gloo_process_groups=False,
    )


def _measure(args: Any, *, reference: bool) -> dict[str, int]:
    """Build model, DDP's buffers, optimizer and reference, and count."""
    from megatron.core.optimizer import get_megatron_optimizer
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.training.argument_utils import pretrain_cfg_container_from_args
    from megatron.training.training import get_megatron_optimizer_config

    from megatron_ext.frozen import FrozenModel
    from megatron_ext.model.model_config import model_config_from_args

    model_config = model_config_from_args(args)
    model_config.transformer.init_model_with_meta_device = True
    model_config.transformer.perform_initialization = False
    container = pretrain_cfg_container_from_args(args, model_config)
    chunks = model_config.get_builder_cls()(model_config).build_distributed_models(
        pg_collection=ProcessGroupCollection.use_mpu_process_groups(),
        ddp_config=container.ddp,
        data_parallel_random_init=False,
    )
    config, overrides = get_megatron_optimizer_config(args)
    optimizer = get_megatron_optimizer(
        config, chunks, config_overrides=overrides, use_gloo_process_groups=False
    )
    parameters = [p for chunk in chunks for p in chunk.parameters()]
    buffers = [b for chunk in chunks for b in (*chunk.buffers, *chunk.expert_parallel_buffers)]
    counted = {
        "parameters": sum(p.numel() for p in parameters),
        "weights": _bytes(parameters),
        "gradients": _bytes(buffer.grad_data for buffer in buffers),
        "optimizer": _optimizer_bytes(optimizer),
    }
    if reference:
        built = FrozenModel.build(model_config)
        counted["reference"] = _bytes(p for chunk in built for p in chunk.parameters())
    return counted


def _bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of the storages behind tensors, each counted once, padding of a buffer included."""
    storages = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


def _optimizer_bytes(optimizer: Any) -> int:
    """Bytes of master weights and moments, which are made by the first step or load."""
    total = 0
    for part in optimizer.chained_optimizers:
        part.init_state_fn(part.optimizer, part.config)
        state = part.optimizer.state
        total += _bytes(t for s in state.values() for t in s.values() if t.dim())
        groups = getattr(part, "shard_fp32_from_float16_groups", None)
        groups = getattr(part, "fp32_from_float16_groups", []) if groups is None else groups
        total += _bytes(p for group in groups for p in group)
    return total
