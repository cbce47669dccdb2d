"""Waiting for the process that writes checkpoints, and what it is handed."""

import multiprocessing
import os
from queue import Empty, Queue
from types import SimpleNamespace

import pytest
import torch
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.async_utils import PersistentAsyncCaller

from megatron_ext.exceptions import CheckpointError
from megatron_ext.runtime import async_saves

fork = multiprocessing.get_context("fork")


def ended():
    process = fork.Process(target=os._exit, args=(3,))
    process.start()
    process.join()
    return process


def test_nobody_waits_for_a_process_that_has_ended():
    queue = fork.JoinableQueue()
    watched = async_saves.WatchedQueue(queue, ended(), [])
    watched.join()  # nothing is to be done
    watched.put("a save")
    with pytest.raises(CheckpointError, match=r"--async-save: .* found it ended with exit code 3"):
        watched.join()
    queue.get()
    queue.task_done()
    watched.join()
    with pytest.raises(CheckpointError, match="found it ended with exit code 3"):
        watched.get_nowait()


def test_what_it_had_done_before_counts_and_a_living_one_is_waited_for():
    queue, living = Queue(), SimpleNamespace(is_alive=lambda: True)
    with pytest.raises(Empty):
        async_saves.WatchedQueue(queue, living, []).get_nowait()
    queue.put(7)
    assert async_saves.WatchedQueue(queue, ended(), []).get_nowait() == 7


def test_nobody_waits_for_what_could_not_be_handed_over():
    living, failures = SimpleNamespace(is_alive=lambda: True), []
    requests, preloads, results = (
        async_saves.WatchedQueue(make(), living, failures)
        for make in (fork.JoinableQueue, fork.JoinableQueue, fork.Queue)
    )
    preloads.put(1)
    requests.put(lambda: "cannot be pickled")
    # The process lives, and never learns that there is something to do.
    message = "--async-save: expected tensors that another process can be handed, found .*pickle"
    with pytest.raises(CheckpointError, match=message):
        preloads.join()
    with pytest.raises(CheckpointError, match=message):
        results.get_nowait()


def test_tensors_in_host_memory_are_copied_before_training_changes_them(monkeypatch):
    writer = filesystem_async.FileSystemWriterAsync
    weight = torch.zeros(3)

    def prepare(self, plan, planner):
        self.write_buckets = [("path", "key", ([("words", b"a")], [("weight", weight)]))]

    monkeypatch.setattr(writer, "prepare_write_data", prepare)
    for place, name in (
        (filesystem_async, "get_write_results_queue"),
        (PersistentAsyncCaller, "_get_process"),
        (PersistentAsyncCaller, "async_loop"),
    ):
        monkeypatch.setattr(place, name, getattr(place, name))
    async_saves.enable()
    target = SimpleNamespace()
    writer.prepare_write_data(target, None, None)
    weight += 1
    ((_, _, (objects, ((name, written),))),) = target.write_buckets
    assert (objects, name, written.tolist()) == ([("words", b"a")], "weight", [0, 0, 0])
