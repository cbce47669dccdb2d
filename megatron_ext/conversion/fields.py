"""How a field or a flag that a conversion cannot carry over is refused."""

from __future__ import annotations

from typing import NoReturn

from megatron_ext.exceptions import CheckpointError


def refuse(field: str, expected: object, found: object) -> NoReturn:
    """Name it.

    Raises:
        CheckpointError: always.
    """
    raise CheckpointError(f"{field}: expected {expected}, found {found}")
