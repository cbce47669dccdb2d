"""Refuses GPUs that cannot be used, and packages for them that were built for another torch.

A node whose driver has failed, or is too old for this torch, looks like a machine without GPUs. Its ranks
would wait over gloo for ranks that use NCCL, and name nobody; if all nodes are like it, the CPUs would train.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import platform
from pathlib import Path

import torch

from megatron_ext.exceptions import ConfigError, first_line

_HIDDEN = ("", "-1", "NoDevFiles")  # CUDA_VISIBLE_DEVICES where somebody, or Slurm, wants none
_ALLOTTED = ("SLURM_GPUS_ON_NODE", "SLURM_STEP_GPUS", "SLURM_JOB_GPUS")
_FILES = Path("/dev")


def check_packages() -> None:
    """Import Transformer Engine where it is installed; to be called before anything of Megatron is imported.

    Megatron would end in a traceback, or leave its layers out without a word.

    Raises:
        ConfigError: it cannot be imported.
    """
    if importlib.util.find_spec("transformer_engine") is None:
        return
    try:
        importlib.import_module("transformer_engine.pytorch")
    except (ImportError, OSError, RuntimeError) as error:
        raise ConfigError(
            f"transformer_engine: expected a build for torch {torch.__version__}, found one that cannot be "
            f"imported ({first_line(error)}); `pip install --no-build-isolation` builds it for the "
            "torch that is installed, and without it the torch-native layers are used"
        ) from error


def check_gpus() -> None:
    """Compare what torch sees with what the machine has.

    Raises:
        ConfigError: the machine has GPUs, or Slurm has allotted some, and torch sees none.
    """
    if torch.cuda.is_available() or os.environ.get("CUDA_VISIBLE_DEVICES") in _HIDDEN:
        return
    if signs := _signs():
        raise ConfigError(
            f"{platform.node()}: expected GPUs, for there is {', '.join(signs)}; found that torch "
            f"{torch.__version__} sees none ({_reason()}); with CUDA_VISIBLE_DEVICES= set to nothing the run "
            "is on the CPU"
        )


def _signs() -> list[str]:
    """What speaks for GPUs in this machine."""
    files = sorted(str(path) for path in _FILES.glob("nvidia[0-9]*"))
    counts = {name: os.environ.get(name, "") for name in _ALLOTTED}
    allotted = [f"{name}={count}" for name, count in counts.items() if count not in ("", "0")]
    return [*files[:1], *allotted[:1]]


def _reason() -> str:
    """Why CUDA does not start, in torch's words."""
    if torch.version.cuda is None:
        return "it was built for CPUs alone"
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    where = "" if visible is None else f"CUDA_VISIBLE_DEVICES={visible}: "
    try:
        torch._C._cuda_init()  # not torch.cuda.init, which the CPU runtime answers
    except RuntimeError as error:
        return where + first_line(error)
    return where + "CUDA starts and has no device"
