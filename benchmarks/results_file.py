"""The file that a benchmark leaves: `<script>-<machine>.json`, its numbers and what they depend on.

{"environment": {device, python, versions, command, commit, date, ...}, "rows": [...], ...}
"""

import importlib.metadata
import json
import os
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PACKAGES = (
    *("triton", "megatron-core", "transformer-engine", "liger-kernel", "cut-cross-entropy"),
    *("numpy", "sentencepiece", "gigatoken"),
)


def environment(
    script: str, device: str | None = None, argv: Sequence[str] | None = None, **more: Any
) -> dict[str, Any]:
    """What numbers depend on: the machine, versions, the command and the commit.

    Args:
        script: the module in `benchmarks`.
        device: "cuda" or "cpu"; None: a GPU where there is one. Asking a GPU for its name takes memory of it.
        argv: the script's arguments; None: this process's.
        more: what else they depend on.
    """
    import torch  # only here: not all who write results need it

    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    words = sys.argv[1:] if argv is None else argv
    commit = _commit()
    return {
        "device": torch.cuda.get_device_name()
        if device == "cuda"
        else f"{os.cpu_count()}-core CPU",
        "python": platform.python_version(),
        "versions": {"torch": torch.__version__} | {name: _version(name) for name in PACKAGES},
        "command": shlex.join(["python", "-m", f"benchmarks.{script}", *words]),
        **({"commit": commit} if commit else {}),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        **more,
    }


def machine(device: str) -> str:
    """A device's model in the name of a file: `h200`, `a100`, `geforce-rtx-4090`; `cpu`."""
    if device.endswith("CPU"):
        return "cpu"
    words = [word for word in re.findall(r"[a-z0-9]+", device.lower()) if word != "nvidia"]
    return next((word for word in words if re.fullmatch(r"[a-z]+\d+[a-z]*", word)), "-".join(words))


def path(folder: Path, script: str, environment: dict[str, Any], suffix: str = "") -> Path:
    """Where `write` puts it; a plot goes beside it."""
    name = f"{script.replace('_', '-')}-{machine(environment['device'])}{suffix}.json"
    return folder / name


def write(
    folder: Path,
    script: str,
    environment: dict[str, Any],
    rows: Sequence[dict[str, Any]],
    suffix: str = "",
    **more: Any,
) -> Path:
    """Write, or write anew with more rows.

    Args:
        folder: made if it is not there.
        script: the module in `benchmarks`.
        environment: from `environment`.
        rows: one for each thing measured, or with the reason why it was not.
        suffix: of the name, for another shape than the usual one.
        more: what belongs to all rows.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = path(folder, script, environment, suffix)
    report = {"environment": environment, **more, "rows": rows}
    file.write_text(json.dumps(report, indent=1) + "\n")
    return file


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """Of this checkout, `-dirty` if its files differ; None where git or the checkout is not."""
    if not (ROOT / ".git").exists():
        return None
    # Not the results: `make bench` writes one file after the other.
    others = ("--untracked-files=no", "--", ".", ":!benchmarks/results")
    try:
        commit, changes = (
            subprocess.run(
                ["git", *words], cwd=ROOT, capture_output=True, text=True, check=True
            ).stdout.strip()
            for words in (("rev-parse", "--short", "HEAD"), ("status", "--porcelain", *others))
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return f"{commit}-dirty" if changes else commit
