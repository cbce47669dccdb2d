"""How many files a process may hold open, against what the data sets of a run hold until it ends.

Megatron maps every array, and Python keeps a descriptor of each file that it has mapped: the usual 1,024
are used up by about 113 data sets with two splits.
"""

from __future__ import annotations

import logging
import math
import resource

from megatron_ext.exceptions import ConfigError

logger = logging.getLogger(__name__)

# Measured, see the tests: the index; with mapped tokens their file, and its map; the arrays of a split.
_INDEX, _TOKENS, _SPLIT = 1, 2, 3
# What else a process holds, connections and logs: at the least, and to be safe where that costs nothing.
_OTHERS, _AMPLE = 256, 4096


def files_of(data_sets: int, *, splits: int, mmap: bool) -> int:
    """Files that a process holds open for data sets.

    Args:
        data_sets: number of them.
        splits: that are built of each.
        mmap: whether tokens are mapped; without, their file is opened at every read.
    """
    return data_sets * (_INDEX + _TOKENS * mmap + _SPLIT * splits)


def check_limit(files: int, data_sets: int) -> None:
    """Refuse data sets whose files cannot all be open at once.

    Args:
        files: that the data sets hold open, from ``files_of``.
        data_sets: their number, for the message.

    Raises:
        ConfigError: the hard limit is too low; the soft one is raised by ``make_room``.
    """
    _, hard = _limits()
    if hard < files + _OTHERS:
        raise ConfigError(
            f"ulimit -n: expected a hard limit of at least {files + _OTHERS} open files, {files} of them for "
            f"{data_sets} data sets, found {hard:g}; raise it (ulimit -Hn, LimitNOFILE, docker's --ulimit "
            "nofile), or tokenise into fewer and larger data sets"
        )


def make_room(files: int) -> None:
    """Raise this process's soft limit as far as data sets need, at most to the hard one.

    Args:
        files: that the data sets hold open.
    """
    soft, hard = _limits()
    wanted = min(files + _AMPLE, hard)
    if soft >= wanted:
        return
    # Not always to the hard limit, which may be a billion: some programs try every number up to their limit.
    try:
        unchanged = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (int(wanted), unchanged))
    except (OSError, ValueError) as error:  # macOS has a limit of its own below the hard one
        logger.warning("ulimit -n: cannot be raised from %g to %g: %s", soft, wanted, error)


def _limits() -> tuple[float, float]:
    """The soft and the hard limit; infinite where there is none."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    unlimited = resource.RLIM_INFINITY
    return (
        math.inf if soft == unlimited else soft,
        math.inf if hard == unlimited else hard,
    )
