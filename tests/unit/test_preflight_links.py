"""Which links between ranks a preflight measures, and how it judges them."""

from unittest import mock

import pytest
import torch.distributed as dist

from megatron_ext.preflight import bandwidth, network, run
from megatron_ext.preflight.ranks import Ranks
from megatron_ext.preflight.verdict import FAIL, PASS, WARN


def test_a_slow_link_is_compared_with_links_of_its_kind():
    nodes = ["a", "a", "b", "b", "c", "c"]
    rates = {(0, 1): 400e9, (1, 2): 50e9, (2, 3): 390e9, (3, 4): 20e9, (4, 5): 410e9, (5, 0): 48e9}
    answers = [
        {
            "all_reduce": [[1 << 20, 3e9]],
            "links": [[a, b, rate] for (a, b), rate in rates.items() if a == r],
        }
        for r in range(6)
    ]
    rows = bandwidth.network(nodes, answers, least=None)
    assert [row.status for row in rows] == [PASS, PASS, WARN]
    assert rows[2].nodes == ("b", "c")
    assert rows[2].detail.startswith(
        "ranks 3 and 4: 20.00 GB/s; 3 between nodes, median 48.00 GB/s"
    )


def answers_of(nodes: list[str], *, bus: float, link: float) -> list[dict]:
    """Of ranks on a ring, with links of one speed both ways together."""
    ring = range(len(nodes))
    return [
        {
            "all_reduce": [[1 << 20, 1e9], [256 << 20, bus]],
            "links": [[r, (r + 1) % len(ring), link]],
        }
        for r in ring
    ]


@pytest.mark.parametrize(
    ("bus", "link", "statuses"),
    [
        (45e9, 95e9, [PASS, PASS]),
        (17e9, 34e9, [PASS, PASS]),  # a third of 50 GB/s each way
        (45e9, 33e9, [PASS, PASS, WARN]),  # one adapter for all GPUs of a node
        (10e9, 20e9, [WARN, PASS, WARN]),  # TCP
    ],
)
def test_a_network_far_below_the_gpu_s_is_told(bus, link, statuses):
    found = answers_of(["a", "b"], bus=bus, link=link)
    rows = bandwidth.network(["a", "b"], found, least=None, promised=50e9)
    assert [row.status for row in rows] == statuses
    warned = [row.detail for row in rows if row.status == WARN]
    assert all("; far below the 50 GB/s of a GPU's adapter: " in detail for detail in warned)
    # Not of GPUs that are not known, nor within a node; and a limit that was asked for comes first.
    assert {row.status for row in bandwidth.network(["a", "b"], found, least=None)} == {PASS}
    alone = bandwidth.network(["a", "a"], found, least=None, promised=50e9)
    assert {row.status for row in alone} == {PASS}
    first = bandwidth.network(["a", "b"], found, least=60e9, promised=50e9)[0]
    assert first.status == FAIL
    assert first.detail.endswith(" GB/s; expected at least 60.00")


@pytest.mark.parametrize(
    ("name", "size", "promised"),
    [
        ("NVIDIA H100 80GB HBM3", 16 << 20, 50e9),
        ("NVIDIA A100-SXM4-80GB", 16 << 20, 25e9),
        ("NVIDIA H100 80GB HBM3", 1 << 20, None),  # too short to show it
        ("NVIDIA L4", 16 << 20, None),
        (None, 16 << 20, None),
    ],
)
def test_what_a_gpu_promises_is_read_from_its_name(monkeypatch, name, size, promised):
    asked = mock.Mock(return_value=[])
    monkeypatch.setattr(run.bandwidth, "network", asked)
    monkeypatch.setattr(run.network, "measure", lambda *_, **__: {})
    ranks = Ranks(dist.HashStore(), 0, 1, 0, "a", 5)
    device = {"devices": 0} if name is None else {"devices": 1, "name": name}
    run._network(ranks, run.Options(message_bytes=[size]), ["a"], [device], [])
    assert asked.call_args.kwargs["promised"] == promised


@pytest.mark.parametrize("per_node", [1, 2, 3, 8])
@pytest.mark.parametrize("count", range(1, 8))
def test_every_rank_has_links_within_and_between_nodes_and_never_two_at_once(count, per_node):
    world = count * per_node
    turns = network.turns(world, per_node)
    for links in turns:
        ends = [rank for link in links for rank in link]
        assert len(ends) == len(set(ends))
    links = [link for turn in turns for link in turn]
    within = [(a, b) for a, b in links if a // per_node == b // per_node]
    between = [link for link in links if link not in within]
    assert {rank for link in within for rank in link} == set(range(world if per_node > 1 else 0))
    # A slow adapter is found whichever GPU it serves.
    assert {rank for link in between for rank in link} == set(range(world if count > 1 else 0))
    assert all(a % per_node == b % per_node for a, b in between)


@pytest.mark.parametrize(
    ("nodes", "count"), [("aabb", 2), ("abab", 1), ("aab", 1), ("aabbbb", 1), ("aaa", 3), ("a", 1)]
)
def test_ranks_of_a_node_are_one_number_or_taken_one_by_one(nodes, count):
    assert network.ranks_of_a_node(list(nodes)) == count
