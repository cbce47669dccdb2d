"""From the measured bandwidths to rows of the table: right, fast enough, and no link slower than its like."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from megatron_ext.preflight.verdict import FAIL, PASS, WARN, Row, errors

# Of the median of links alike.
_SLOW_LINK = 0.5
# Of the vendor's figure between nodes. Some nodes have half as many adapters, or adapters of half the speed;
# TCP over 100 Gb/s Ethernet reaches a quarter with one GPU a node, and with eight an eighth of that.
_FAR_BELOW = 1 / 3


def network(
    nodes: Sequence[str],
    answers: Sequence[Mapping[str, Any]],
    *,
    least: float | None,
    promised: float | None = None,
) -> list[Row]:
    """Sums are right, fast enough, and no link is much slower than the others of its kind.

    Args:
        nodes: of the ranks.
        answers: what `network.measure` returned.
        least: bytes a second of bus bandwidth that the largest message must reach.
        promised: bytes a second to other nodes, each way, that a GPU of this kind is sold with; None if that
            is not known, or the messages are too small to reach it.
    """
    rows = errors("all-reduce", nodes, answers)
    if rows:
        return rows
    # A collective ends when its last rank does.
    slowest = [
        (one[0][0], min(rate for _, rate in one))
        for one in zip(*(answer["all_reduce"] for answer in answers), strict=True)
    ]
    rates = ", ".join(f"{size / 2**20:g} MiB {rate / 1e9:.2f} GB/s" for size, rate in slowest)
    slow = least is not None and slowest[-1][1] < least and len(nodes) > 1
    wanted = f"; expected at least {least / 1e9:.2f}" if slow and least is not None else ""
    status = FAIL if slow else PASS
    # Every ring through several nodes has at least one adapter.
    if not slow and promised and len(set(nodes)) > 1 and slowest[-1][1] < _FAR_BELOW * promised:
        status, wanted = WARN, _far_below(promised)
    rows.append(Row("all-reduce", status, (), f"sums right; bus bandwidth {rates}{wanted}"))
    links = [link for answer in answers for link in answer["links"]]
    for kind in ("within nodes", "between nodes"):
        rates_of = {
            (int(a), int(b)): rate
            for a, b, rate in links
            if (nodes[int(a)] == nodes[int(b)]) == (kind == "within nodes")
        }
        if rates_of:
            rows += _links(kind, nodes, rates_of)
            # Links are measured both ways at once, and all local ranks' together.
            middle = statistics.median(rates_of.values()) / 2
            if promised and kind == "between nodes" and middle < _FAR_BELOW * promised:
                text = f"{kind}, median {middle / 1e9:.2f} GB/s each way{_far_below(promised)}"
                rows.append(Row("links", WARN, (), text))
    return rows


def _far_below(promised: float) -> str:
    return (
        f"; far below the {promised / 1e9:g} GB/s of a GPU's adapter: does NCCL use TCP, or one adapter for "
        "all GPUs? (NCCL_DEBUG=INFO tells)"
    )


def _links(kind: str, nodes: Sequence[str], rates: Mapping[tuple[int, int], float]) -> list[Row]:
    median = statistics.median(rates.values())
    slow = {link: rate for link, rate in rates.items() if rate < _SLOW_LINK * median}
    text = f"{len(rates)} {kind}, median {median / 1e9:.2f} GB/s"
    if not slow:
        return [Row("links", PASS, (), f"{text}, slowest {min(rates.values()) / 1e9:.2f}")]
    return [
        Row(
            *("links", WARN, tuple(dict.fromkeys((nodes[a], nodes[b])))),
            f"ranks {a} and {b}: {rate / 1e9:.2f} GB/s; {text}",
        )
        for (a, b), rate in slow.items()
    ]
