"""Checkpoints of one small tensor."""

import argparse
from pathlib import Path

import torch

from megatron_ext.checkpoint.inspect import TRACKER, folder_name
from megatron_ext.checkpoint.torch_dist import LazyTensor, write


def write_iterations(directory: Path, *iterations: int) -> Path:
    """Complete checkpoints whose weights are their iteration; the last is the latest."""
    saved = argparse.Namespace(max_position_embeddings=64)
    for iteration in iterations:
        value = float(iteration)
        tensor = LazyTensor("weight", (), (8, 8), lambda value=value: torch.full((8, 8), value))
        write(directory / folder_name(iteration), [tensor], dtype=torch.float32, args=saved)
        (directory / TRACKER).write_text(str(iteration))
    return directory
