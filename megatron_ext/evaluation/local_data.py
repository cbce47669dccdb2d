"""Data sets of the harness from files on this machine, by the names that they have on the hub."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

from megatron_ext.exceptions import DataError

_READERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}
_SPLITS = ("train", "validation", "val", "dev", "test")


def data_files(folder: Path) -> tuple[str, dict[str, list[str]]] | None:
    """Files of a folder by split: names begin with it, as in ``test.jsonl``, ``test-00000-of-2.parquet``.

    Returns:
        How to read them, and the files; ``None`` if there are none.
    """
    found: dict[str, dict[str, list[str]]] = {}
    for file in sorted(folder.iterdir()) if folder.is_dir() else ():
        split = file.name.partition(".")[0].partition("-")[0]
        if file.suffix in _READERS and split in _SPLITS:
            found.setdefault(_READERS[file.suffix], {}).setdefault(split, []).append(str(file))
    return next(iter(found.items()), None)


@contextlib.contextmanager
def offline(root: Path) -> Iterator[None]:
    """Let the harness find its data sets under a folder, and nowhere else.

    ``root/NAME`` or ``root/NAME/CONFIG`` holds the files of a data set, NAME being its name on the hub, such
    as ``cais/mmlu``; a clone from the hub has this form. What is in another one is read by ``datasets``.

    Args:
        root: the folder.
    """
    import datasets
    from huggingface_hub import constants

    original = datasets.load_dataset

    def load(path: str, name: str | None = None, **settings: Any) -> Any:
        base = root / path
        if not base.is_dir():
            raise DataError(f"--data-dir: expected the data set {path} at {base}, found nothing")
        for folder in (base / name if name else base, base):
            if (files := data_files(folder)) is not None:
                reader, splits = files
                return original(reader, data_files=splits)
        try:
            return original(str(base), name, **settings)
        except Exception as error:  # whatever the library raises, the user needs the folder
            raise DataError(
                f"--data-dir: {base} cannot be read as {path} {name}: {error}"
            ) from error

    # Both libraries have read the variables by now; processes that are started still will.
    with (
        _set("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"),
        mock.patch.object(constants, "HF_HUB_OFFLINE", True),
        mock.patch.multiple(
            datasets.config, create=True, HF_HUB_OFFLINE=True, HF_DATASETS_OFFLINE=True
        ),
        mock.patch.object(datasets, "load_dataset", load),
    ):
        yield


@contextlib.contextmanager
def _set(*variables: str) -> Iterator[None]:
    """Set variables of the environment to 1, and put back what they were."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ |= dict.fromkeys(variables, "1")
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
