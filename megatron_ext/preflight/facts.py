"""What a rank finds on its node: versions, this checkout, its GPU."""

from __future__ import annotations

import csv
import hashlib
import importlib.metadata
import platform
import shutil
import subprocess
from pathlib import Path
from typing import Any

import torch

from megatron_ext.exceptions import first_line

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("torch", "megatron-core", "transformer-engine", "triton", "numpy")
_QUERY = ("index", "driver_version", "ecc.errors.uncorrected.volatile.total", "memory.used")


def versions() -> dict[str, str]:
    """Versions that must be equal on all nodes, by name; `none` for what is absent."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "none"
    found["cuda"] = str(torch.version.cuda or "none").lower()
    nccl = torch.cuda.nccl.version() if torch.cuda.is_available() else None
    found["nccl"] = ".".join(map(str, nccl)) if nccl else "none"
    return found | {"commit": _commit(), "checkout": _content()}


def _commit() -> str:
    return _git("rev-parse", "--short=12", "HEAD") or "none"


def edited() -> str:
    """Whether files of the commit were changed since: `yes`, `no`, or `unknown` where git is not there."""
    changed = _git("status", "--porcelain", "--untracked-files=no")
    return "unknown" if changed is None else "yes" if changed else "no"


def _git(*words: str) -> str | None:
    """What git says of this checkout; `None` where it says nothing."""
    if shutil.which("git") is None:
        return None
    # A checkout that another user made is refused without the setting.
    command = ["git", "-c", f"safe.directory={ROOT}", "-C", str(ROOT), *words]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except subprocess.TimeoutExpired:
        return None
    return result.stdout.strip() if result.returncode == 0 else None


def _content() -> str:
    """Digest of the code: a commit says nothing of what was edited since."""
    digest = hashlib.sha256()
    for path in (ROOT / "pretrain_unlearn.py", *sorted((ROOT / "megatron_ext").rglob("*.py"))):
        digest.update(f"{path.relative_to(ROOT)}\0".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def gpu(local_rank: int) -> dict[str, Any]:
    """The GPU of a rank: name, bytes in all and in use by anybody; `devices` of its node.

    A rank without one says why in `error` if the node has some, but not for it.
    """
    devices = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if devices == 0:
        return {"devices": 0}
    if local_rank >= devices:
        return {"devices": devices, "error": f"no GPU {local_rank} among {devices}"}
    try:
        torch.cuda.set_device(local_rank)
        free, total = torch.cuda.mem_get_info()
    except RuntimeError as error:  # a GPU that fell off the bus
        return {"devices": devices, "error": first_line(error)}
    return {"devices": devices, "name": torch.cuda.get_device_name(), "total": total, "free": free}


def driver() -> list[dict[str, str]]:
    """What nvidia-smi says of the node's GPUs, one row each; empty without it."""
    if shutil.which("nvidia-smi") is None:
        return []
    words = ["nvidia-smi", f"--query-gpu={','.join(_QUERY)}", "--format=csv,noheader,nounits"]
    try:
        result = subprocess.run(words, capture_output=True, text=True, timeout=30)
    except subprocess.TimeoutExpired:
        return [{"error": "nvidia-smi did not answer within 30 s"}]
    if result.returncode:
        said = (result.stdout or result.stderr).strip().rpartition("\n")[2]
        return [{"error": said or f"nvidia-smi ended with exit code {result.returncode}"}]
    rows = csv.reader(result.stdout.splitlines(), skipinitialspace=True)
    return [dict(zip(_QUERY, row, strict=True)) for row in rows]
