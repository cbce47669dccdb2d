"""What Megatron's loop needs so that a run which was killed loses nothing and goes on exactly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from megatron_ext.checkpoint.complete import MARKS


def apply() -> None:
    """Apply both of the following; called once before training."""
    prepare_saves()
    give_loaders_generators()


def prepare_saves() -> None:
    """Wrap ``save_checkpoint`` of Megatron's loop.

    TensorBoard's writer keeps what is logged in memory for two minutes: a run that is killed after a
    checkpoint and goes on from it would never log those steps again. And a folder that an earlier run
    left unfinished, or that is written again after a broken checkpoint, must not look complete while new
    tensors replace the old.
    """
    import megatron.training.training as loop

    save = loop.save_checkpoint

    def save_after_preparing(iteration: int, *args: Any, **kwargs: Any) -> Any:
        if writer := loop.get_tensorboard_writer():
            writer.flush()
        options = loop.get_args()
        if options.save and options.rank == 0:
            # Rank 0 alone writes these files, after all ranks have written their tensors.
            for mark in MARKS:
                (Path(options.save) / f"iter_{iteration:07d}" / mark).unlink(missing_ok=True)
        return save(iteration, *args, **kwargs)

    loop.save_checkpoint = save_after_preparing


def give_loaders_generators() -> None:
    """Give each data loader of Megatron's loop a random generator of its own.

    torch draws a seed for workers whenever an iterator is made, by default from the generator whose state
    is in the checkpoint: each resume would leave it one draw further than a run that was never stopped,
    on those ranks alone that read data.
    """
    import megatron.training.training as loop

    build = loop.build_pretraining_data_loader

    def build_with_generator(*args: Any, **kwargs: Any) -> Any:
        loader = build(*args, **kwargs)
        if loader is not None:
            loader.generator = torch.Generator().manual_seed(loop.get_args().seed)
        return loader

    loop.build_pretraining_data_loader = build_with_generator
