"""Whether any rank was told to end, by one collective."""

from unittest import mock

import torch.distributed as dist
from megatron.training.dist_signal_handler import DistributedSignalHandler

from megatron_ext.runtime import signals
from tests.helpers.distributed import run_ranks


def ask() -> list[list[bool]]:
    signals.ask_at_once()
    handler = DistributedSignalHandler()
    found = []
    for told in (set(), {1}, {0, 1}):
        handler._signal_received = dist.get_rank() in told
        with mock.patch.object(dist, "all_gather") as gather:
            found.append(handler.signals_received())
        gather.assert_not_called()
    return found


def test_every_rank_hears_of_it():
    assert run_ranks(ask, 2) == [[[False], [True], [True]]] * 2


def test_a_process_that_runs_alone_answers_for_itself():
    signals.ask_at_once()
    handler = DistributedSignalHandler()
    handler._signal_received = True
    assert handler.signals_received() == [True]
