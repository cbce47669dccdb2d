"""Which links between ranks a preflight measures, and how it judges them."""

import pytest

from megatron_ext.preflight import network, verdict
from megatron_ext.preflight.verdict import PASS, WARN


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
    rows = verdict.network(nodes, answers, least=None)
    assert [row.status for row in rows] == [PASS, PASS, WARN]
    assert rows[2].nodes == ("b", "c")
    assert rows[2].detail.startswith(
        "ranks 3 and 4: 20.00 GB/s; 3 between nodes, median 48.00 GB/s"
    )


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
