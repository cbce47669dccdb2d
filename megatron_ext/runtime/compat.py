"""What megatron-core 0.19.2's training loop needs on every machine, each with its reason."""

from __future__ import annotations

import importlib.util
import logging
from importlib.metadata import version

from megatron_ext.exceptions import ConfigError

logger = logging.getLogger(__name__)

# The seams used here (the schedule getter of the loop, output_processor, post_wrap_hooks) were read in
# this version; another one may have moved them, and a moved seam would silently train something else.
MEGATRON_VERSION = "0.19.2"


def check_megatron_version() -> None:
    """Refuse to run on a megatron-core whose seams were not checked.

    Raises:
        ConfigError: another version than :data:`MEGATRON_VERSION` is installed.
    """
    found = version("megatron-core")
    if found != MEGATRON_VERSION:
        raise ConfigError(
            f"megatron-core: expected version {MEGATRON_VERSION} (requirements.txt), found {found}"
        )


def skip_helper_compilation() -> None:
    """Do not run ``make`` for the dataset helpers where the wheel already brings them compiled.

    The wheel carries ``helpers_cpp`` as a compiled module but not the Makefile that Megatron's
    ``compile_helpers()`` calls, so ``pretrain()`` would exit on every machine.
    """
    if importlib.util.find_spec("megatron.core.datasets.helpers_cpp") is None:
        return
    import megatron.core.datasets.utils as dataset_utils

    dataset_utils.compile_helpers = lambda: None


def apply() -> None:
    """Apply all of the above; called once by the entry point before training."""
    check_megatron_version()
    skip_helper_compilation()
