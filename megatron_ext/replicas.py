"""Work that needs no step: each replica of a model takes its share."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from megatron.core import parallel_state


def over_replicas[Item, Result](
    items: Sequence[Item], work: Callable[[Sequence[Item]], Iterable[Result]]
) -> list[Result]:
    """Each model replica's share of the work, and all of its results on every rank.

    Args:
        items: the same on every rank.
        work: makes a result, which can be pickled, of each item of a share, in order.

    Returns:
        A result for each item; on a pipeline stage what `work` made there.
    """
    rank = parallel_state.get_data_parallel_rank()
    ranks = parallel_state.get_data_parallel_world_size()
    mine = items[rank::ranks]
    found = list(work(mine)) if mine else []
    if ranks == 1:
        return found
    gathered: list[Any] = [None] * ranks
    group = parallel_state.get_data_parallel_group()
    torch.distributed.all_gather_object(gathered, found, group=group)
    return [gathered[i % ranks][i // ranks] for i in range(len(items))]
