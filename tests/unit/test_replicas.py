"""Work that is shared among the replicas of a model."""

import pytest
import torch

from megatron_ext import replicas


@pytest.mark.parametrize(("count", "ranks"), [(5, 2), (1, 3), (0, 2), (4, 1)])
def test_each_replica_works_on_its_share_and_all_have_the_results(count, ranks, monkeypatch):
    items = list(range(count))
    taken = {rank: items[rank::ranks] for rank in range(ranks)}
    state = replicas.parallel_state
    monkeypatch.setattr(state, "get_data_parallel_world_size", lambda: ranks)
    monkeypatch.setattr(state, "get_data_parallel_group", lambda: "replicas")
    seen = []

    def gather(into, mine, *, group):
        assert (group, mine) == ("replicas", [item * 10 for item in seen])
        into[:] = [[item * 10 for item in share] for share in taken.values()]

    monkeypatch.setattr(torch.distributed, "all_gather_object", gather)

    def work(share):
        for item in share:
            seen.append(item)
            yield item * 10

    for rank in range(ranks):
        seen.clear()
        monkeypatch.setattr(state, "get_data_parallel_rank", lambda rank=rank: rank)
        assert replicas.over_replicas(items, work) == [item * 10 for item in items]
        assert seen == taken[rank]
