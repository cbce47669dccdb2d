"""All-reduce: is it right, and how fast; and links between neighbours, to find one that is slow."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from megatron_ext.exceptions import first_line
from megatron_ext.preflight.ranks import Ranks

_REPEATS = 5
# Of the time that ranks wait for each other: all are back before the first loses patience.
_SHARE = 0.8


def measure(
    ranks: Ranks, *, sizes: Sequence[int], link_bytes: int, per_node: int
) -> dict[str, Any]:
    """Measure on all ranks at once; NCCL where there is a GPU, gloo elsewhere.

    Args:
        ranks: all; nobody may be missing.
        sizes: bytes of the messages that are summed over all ranks.
        link_bytes: bytes of the messages between neighbours.
        per_node: ranks of each node, by `ranks_of_a_node`.

    Returns:
        `all_reduce`: [bytes, bus bandwidth in bytes a second] of each size, as nccl-tests count it;
        `links`: [this rank, neighbour, bytes a second in both directions together] of the links that this
        rank began; or `error`, in one line, for whatever went wrong.
    """
    limit = _SHARE * ranks.timeout
    found: list[dict[str, Any]] = []
    # In a thread: to connect NCCL takes as long as it takes, with no limit to set.
    work = threading.Thread(
        target=lambda: found.append(_measure(ranks, sizes, link_bytes, per_node, limit)),
        daemon=True,
    )
    work.start()
    work.join(limit)
    return found[0] if found else {"error": f"collectives did not end within {limit:g} s"}


def _measure(
    ranks: Ranks, sizes: Sequence[int], link_bytes: int, per_node: int, limit: float
) -> dict[str, Any]:
    gpu = torch.cuda.is_available()
    device = torch.device("cuda", ranks.local_rank) if gpu else torch.device("cpu")
    try:
        if gpu:
            torch.cuda.set_device(device)  # a thread has its own
        dist.init_process_group(
            "nccl" if gpu else "gloo",
            store=dist.PrefixStore("network", ranks.store),
            rank=ranks.rank,
            world_size=ranks.world,
            # When NCCL's is over, torch ends the process, and nobody would say why.
            timeout=timedelta(seconds=10 * limit if gpu else limit),
        )
        reduced = [[size, _all_reduce(ranks, size, device)] for size in sizes]
        links = _links(ranks, link_bytes, device, per_node)
    except (RuntimeError, ValueError) as error:
        # The group is left as it is: to end it could mean to wait for the rank that is stuck.
        return {"error": first_line(error)}
    dist.destroy_process_group()
    return {"all_reduce": reduced, "links": links}


def _all_reduce(ranks: Ranks, size: int, device: torch.device) -> float:
    """Bus bandwidth in bytes a second.

    Raises:
        ValueError: the sum is wrong.
    """
    count = max(1, size // 4)
    # Small integers: their sums are exact in fp32 whatever the order.
    pattern = torch.arange(count, device=device, dtype=torch.float32).remainder_(97)
    tensor = pattern + ranks.rank
    _finish([dist.all_reduce(tensor, async_op=True)], device)
    pattern.mul_(ranks.world).add_(ranks.world * (ranks.world - 1) // 2)
    if not torch.equal(tensor, pattern):
        wrong = int((tensor != pattern).sum())
        raise ValueError(f"an all-reduce of {size} bytes gave {wrong} wrong sums of {count}")
    begin = time.perf_counter()
    for _ in range(_REPEATS):
        _finish([dist.all_reduce(tensor, async_op=True)], device)
    seconds = (time.perf_counter() - begin) / _REPEATS
    return 2 * (ranks.world - 1) / ranks.world * 4 * count / seconds


def _links(ranks: Ranks, size: int, device: torch.device, per_node: int) -> list[list[float]]:
    """Each rank with its neighbours, no rank in two links at a time."""
    found: list[list[float]] = []
    for links in turns(ranks.world, per_node):
        for first, second in links:
            if ranks.rank not in (first, second):
                continue
            seconds = _exchange(second if ranks.rank == first else first, size, device)
            if ranks.rank == first:
                found.append([first, second, 2 * size / seconds])
    return found


def ranks_of_a_node(nodes: Sequence[str]) -> int:
    """How many ranks each node has, one behind the other; 1 if that is no one number.

    Args:
        nodes: of the ranks.
    """
    count = nodes.count(nodes[0])
    even = len(set(nodes)) * count == len(nodes)
    blocks = (set(nodes[i : i + count]) for i in range(0, len(nodes), count))
    return count if even and all(len(block) == 1 for block in blocks) else 1


def turns(world: int, per_node: int) -> list[list[tuple[int, int]]]:
    """Which links are measured together: a ring in each node, then one through all nodes for each local rank.

    So every network adapter that serves a GPU has a link of its own, and not only those of a node's first
    and last rank.

    Args:
        world: ranks.
        per_node: ranks of each node.
    """
    nodes = range(world // per_node)
    inside = [
        [(node * per_node + a, node * per_node + b) for node in nodes for a, b in links]
        for links in _ring(per_node)
    ]
    between = [
        [
            (a * per_node + local, b * per_node + local)
            for a, b in links
            for local in range(per_node)
        ]
        for links in _ring(len(nodes))
    ]
    return inside + between


def _ring(count: int) -> list[list[tuple[int, int]]]:
    """Links between neighbours in two turns, and in a third one for an odd number of them."""
    links = [(i, (i + 1) % count) for i in range(count if count > 2 else count - 1)]
    last = [links.pop()] if len(links) % 2 and count > 2 else []
    return [links[::2], links[1::2], last]


def _exchange(peer: int, size: int, device: torch.device) -> float:
    """Send and receive at once; seconds, without the first time, which makes the connection."""
    sent = torch.ones(size, dtype=torch.uint8, device=device)
    received = torch.empty_like(sent)
    for attempt in range(1 + _REPEATS):
        if attempt == 1:
            begin = time.perf_counter()
        operations = [dist.P2POp(dist.isend, sent, peer), dist.P2POp(dist.irecv, received, peer)]
        _finish(dist.batch_isend_irecv(operations), device)
    return (time.perf_counter() - begin) / _REPEATS


def _finish(works: Sequence[Any], device: torch.device) -> None:
    """Wait for collectives: for gloo up to the group's limit, for NCCL as long as it takes."""
    for work in works:
        work.wait()
    if device.type == "cuda":
        torch.cuda.synchronize()  # NCCL's wait is the stream's, not this thread's
