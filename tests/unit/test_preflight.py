"""Preflight on two ranks that play two nodes, over gloo; the second has every kind of failure in turn."""

import json
import multiprocessing
import os
import pickle
import threading
from contextlib import ExitStack
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from unittest import mock

import pytest
import sentencepiece
import torch.distributed as dist

from megatron_ext.data.tokenizers import TokenizerSpec
from megatron_ext.preflight import facts, files, network, run, verdict
from megatron_ext.preflight.ranks import MissingRanksError, Ranks
from megatron_ext.preflight.verdict import FAIL, PASS, WARN, Row
from tests.helpers.tiny import preprocess

SPEC = TokenizerSpec(tokenizer_type="SentencePieceTokenizer", tokenizer_model="tokenizer.model")
OPTIONS = run.Options(
    **{"shared": Path("../shared"), "probe_bytes": 2 << 20, "data": ["set"], "tokenizer": SPEC},
    message_bytes=(1 << 10, 1 << 16),
)


class GoneError(Exception):
    """What ends a rank in the middle."""


def _versions() -> dict[str, str]:
    return facts_versions() | {"torch": "9.9", "checkout": "edited"}


facts_versions = facts.versions
all_reduce = dist.all_reduce


def _wrong_all_reduce(tensor, **kwargs):
    tensor[3] += 1
    return all_reduce(tensor, **kwargs)


# Options, and what is different on the second rank.
CASES = {
    "good": (OPTIONS, []),
    "versions": (OPTIONS, [mock.patch.object(facts, "versions", _versions)]),
    "gpu": (
        OPTIONS,
        [mock.patch.object(facts, "gpu", return_value={"devices": 1, "error": "no GPU 1 among 1"})],
    ),
    "clock": (OPTIONS, [mock.patch.object(run.time, "time", return_value=30.0)]),
    "folder": (replace(OPTIONS, shared=Path("own")), []),
    "read-only": (
        OPTIONS,
        [mock.patch.object(files.tempfile, "TemporaryFile", side_effect=OSError(30, "Read-only"))],
    ),
    "room": (replace(OPTIONS, checkpoint_bytes=1 << 60), []),
    "sum": (OPTIONS, [mock.patch.object(dist, "all_reduce", _wrong_all_reduce)]),
    "slow": (replace(OPTIONS, least_bandwidth=1e15), []),
    "manifest": (replace(OPTIONS, data=["broken"]), []),
    "inputs": (replace(OPTIONS, inputs=["../start", "chat.jsonl", "missing"]), []),
    "tokenizer": (replace(OPTIONS, tokenizer=replace(SPEC, tokenizer_model="other.model")), []),
    "late": (OPTIONS, [mock.patch.object(run, "_clock", side_effect=GoneError)]),
    "in all-reduce": (OPTIONS, [mock.patch.object(network, "measure", side_effect=GoneError)]),
}


# Of the cases that wait until it is over, and long enough for a busy machine.
TIMEOUTS = {"late": 5.0, "in all-reduce": 10.0, "folder": 10.0}


def _rank(rank: int, port: int, directory: Path) -> None:
    """All cases on one rank; each node has a folder of its own, where relative paths lead."""
    os.chdir(directory / f"node{rank}")
    store = dist.TCPStore("127.0.0.1", port, is_master=False)
    results = {}
    for name, (options, differences) in CASES.items():
        timeout = TIMEOUTS.get(name, 60.0)
        own = dist.PrefixStore(name, store)
        ranks = Ranks(own, rank, 2, 0, f"node{rank}", timeout)
        with ExitStack() as stack:
            for difference in differences if rank else ():
                stack.enter_context(difference)
            try:
                results[name] = run.run(ranks, options)
            except GoneError:
                results[name] = []
        if dist.is_initialized():
            dist.destroy_process_group()
        store.set(f"{name} {rank}", "")
        store.wait([f"{name} {other}" for other in range(2)], timedelta(seconds=60))
    (directory / f"result{rank}").write_bytes(pickle.dumps(results))


@pytest.fixture(scope="module")
def nodes(tmp_path_factory) -> Path:
    """The folders of two nodes: the same data and tokenizer, but a manifest and a tokenizer that differ."""
    directory = tmp_path_factory.mktemp("nodes")
    for node, word in ((0, "one"), (1, "two")):
        folder = directory / f"node{node}"
        folder.mkdir()
        lines = [f"a line number {i} and its square {i * i}" for i in range(200)]
        for name, extra in (("tokenizer", "same"), ("other", word)):
            text = folder / f"{name}.txt"
            text.write_text("\n".join(line.replace("line", extra) for line in lines))
            sentencepiece.SentencePieceTrainer.train(
                input=str(text), model_prefix=str(folder / name), vocab_size=60, minloglevel=2
            )
    first, second = directory / "node0", directory / "node1"
    (first / "text.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    (second / "tokenizer.model").write_bytes((first / "tokenizer.model").read_bytes())
    preprocess(first / "text.jsonl", first / "x", tokenizer=first / "tokenizer.model")
    for suffix in ("bin", "idx", "manifest.json"):
        content = (first / f"x_text_document.{suffix}").read_bytes()
        for folder in (first, second):
            (folder / f"set.{suffix}").write_bytes(content)
            (folder / f"broken.{suffix}").write_bytes(content)
    (directory / "start" / "iter_0000020").mkdir(parents=True)
    (directory / "start" / "latest_checkpointed_iteration.txt").write_text("20")
    (directory / "start" / "iter_0000020" / ".metadata").write_text("of tensors")
    (first / "chat.jsonl").write_text("one\n")
    (second / "chat.jsonl").write_text("two\n")
    (first / "missing").touch()
    manifest = second / "broken.manifest.json"
    changed = json.loads(manifest.read_text())
    manifest.write_text(json.dumps(changed | {"tokens": changed["tokens"] + 1}))
    return directory


@pytest.fixture(scope="module")
def tables(nodes) -> dict[str, tuple[list[Row], list[Row]]]:
    """What both ranks returned in each case."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=_rank, args=(r, store.port, nodes)) for r in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(300)
        if process.is_alive():
            process.kill()
    assert [process.exitcode for process in processes] == [0, 0]
    first, second = (pickle.loads((nodes / f"result{r}").read_bytes()) for r in range(2))
    return {name: (first[name], second[name]) for name in CASES}


def failures(table: tuple[list[Row], list[Row]]) -> list[Row]:
    return [row for row in table[0] if row.status == FAIL]


def test_two_good_nodes_pass(tables, nodes):
    rows, others = tables["good"]
    assert others == []
    assert {row.status for row in rows} == {PASS}
    assert [row.check for row in rows] == [
        *("ranks", "clock", "versions", "checkout", "GPU", "all-reduce", "links", "shared folder"),
        *("free space", "tokenizer", "data"),
    ]
    assert list((nodes / "shared").iterdir()) == []
    link = next(row for row in rows if row.check == "links")
    assert link.detail.startswith("1 between nodes, median ")


@pytest.mark.parametrize(
    ("case", "check", "node", "start"),
    [
        ("versions", "torch", "node1", "expected "),
        ("versions", "checkout", "node1", "expected "),
        ("clock", "clock", "node1", "-"),
        ("gpu", "GPU", "node1", "no GPU 1 among 1"),
        (
            "folder",
            "shared folder",
            "node1",
            "own: rank 0's file is not there: not the same folder",
        ),
        (
            *("read-only", "shared folder", "node1"),
            "../shared: can be read, but not written: Read-only",
        ),
        ("room", "free space", None, ""),
        ("slow", "all-reduce", None, "sums right"),
        ("manifest", "data", "node1", "broken.manifest.json describes "),
        ("tokenizer", "tokenizer", "node1", "expected 60 pieces"),
    ],
)
def test_what_differs_on_the_second_node_fails_and_names_it(tables, case, check, node, start):
    found = {row.check: row for row in failures(tables[case])}
    assert found[check].nodes == ((node,) if node else ())
    assert found[check].detail.startswith(start)
    expected = {"versions": {"torch", "checkout"}, "tokenizer": {"tokenizer", "data"}}
    assert set(found) == expected.get(case, {check})
    assert tables[case][1] == []


def test_a_start_and_files_are_read_from_both_nodes(tables):
    start, chat, missing = (row for row in tables["inputs"][0] if row.check == "input")
    assert (start.status, start.nodes) == (PASS, ())
    assert start.detail.startswith("../start: iter_0000020, 1 files, digest ")
    assert (chat.status, chat.nodes) == (FAIL, ("node1",))
    assert chat.detail.startswith("expected chat.jsonl: 4 bytes, digest ")
    assert (missing.status, missing.nodes) == (FAIL, ("node1",))
    assert missing.detail == "missing: cannot be read: No such file or directory"


def test_a_wrong_sum_fails(tables):
    (row,) = failures(tables["sum"])
    assert (row.check, row.nodes) == ("all-reduce", ("node0", "node1"))
    assert row.detail == "an all-reduce of 1024 bytes gave 1 wrong sums of 256"


@pytest.mark.parametrize(("case", "point"), [("late", "clock"), ("in all-reduce", "network")])
def test_a_rank_that_does_not_come_is_named(tables, case, point):
    (row,) = failures(tables[case])
    assert row.detail == f"{point}: rank 1 of 2 did not arrive within {TIMEOUTS[case]:g} s"
    assert tables[case][0][0].status == PASS  # what was found before stands


def test_a_collective_that_never_ends_is_given_up(monkeypatch):
    monkeypatch.setattr(network, "_measure", lambda *_: threading.Event().wait())
    ranks = Ranks(dist.HashStore(), 0, 2, 0, "n", 0.5)
    found = network.measure(ranks, sizes=(4,), link_bytes=4, per_node=1)
    assert found == {"error": "collectives did not end within 0.4 s"}


def test_missing_ranks_are_listed_in_ranges_and_rank_0_is_missed_too():
    store = dist.HashStore()
    ranks = Ranks(store, 0, 9, 0, "n", 0.1)
    for rank in (1, 5):
        store.set(f"preflight/start/{rank}", "1")
    with pytest.raises(MissingRanksError, match=r"^start: ranks 2-4, 6-8 of 9 did not arrive"):
        ranks.gather("start", 1)
    with pytest.raises(MissingRanksError, match=r"^begin: rank 0 did not answer within 0.2 s"):
        replace(ranks, rank=3).gather("begin", 1)


def test_gpus_are_judged_by_count_name_memory_and_errors():
    gpu = {"devices": 2, "name": "H200", "total": 100 << 30, "free": 99 << 30}
    ecc = "ecc.errors.uncorrected.volatile.total"
    smi = {"index": "0", "driver_version": "570", ecc: "0"}
    drivers = {"a": [smi, smi | {ecc: "[N/A]"}], "b": [smi | {"driver_version": "580"}]}
    good = verdict.gpus(["a", "a"], [gpu, gpu], {"a": drivers["a"]})
    assert [(row.check, row.status) for row in good] == [("GPU", PASS), ("driver", PASS)]
    answers = [gpu, gpu, gpu | {"free": 80 << 30}, {"devices": 1, "error": "no GPU 1 among 1"}]
    drivers["b"].append(smi | {"index": "1", ecc: "3"})
    rows = verdict.gpus(["a", "a", "b", "b"], answers, drivers)
    assert rows == [
        Row("GPU", FAIL, ("b",), "no GPU 1 among 1"),
        Row("GPU", PASS, (), "2 x H200, 100 GiB"),
        Row("GPU memory", WARN, ("b",), "up to 20.0 GiB in use before the run"),
        Row("driver", FAIL, ("b",), "expected 570 as elsewhere, found 580"),
        Row("GPU memory", FAIL, ("b",), "GPU 1: 3 uncorrected memory errors since its last reset"),
    ]


def test_gpus_that_torch_does_not_see_fail_though_no_node_has_one():
    smi = {"index": "0", "driver_version": "570", "ecc.errors.uncorrected.volatile.total": "0"}
    none = [{"devices": 0}] * 2
    assert verdict.gpus(["a", "b"], none, {"a": [], "b": []}) == [Row("GPU", PASS, (), "none")]
    rows = verdict.gpus(["a", "b"], none, {"a": [smi], "b": [smi]})
    assert rows[1] == Row("GPU", FAIL, ("a", "b"), "there is an nvidia-smi, but torch sees no GPU")
