"""One rank of a job looks at checkpoints before the start, and all ranks go on from what it has found."""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter

import pytest

from megatron_ext.checkpoint.complete import MARKS
from tests.helpers.entry import ROOT, Launch
from tests.integration.conftest import HALF, STEPS, TRAIN

SCRIPT = ROOT / "tests" / "helpers" / "touched.py"
RANKS = 4


@pytest.fixture
def saved(straight, runs_directory, tmp_path):
    """What a run has saved after half of its steps and at their end."""
    assert straight.returncode == 0
    return shutil.copytree(runs_directory / "straight", tmp_path / "saved")


def start(tiny, server, saved, tmp_path, launcher="torchrun"):
    """Resume from a folder until Megatron's loop begins: exit code and output, and what each rank did."""
    out = tmp_path / launcher
    flags = tiny.objective(*TRAIN, "--load", saved, "--tensor-model-parallel-size", 2)
    flags = (*flags, "--pretrained-checkpoint", tiny.base, "--save", saved)
    ((code, output),) = server.results([Launch((out, launcher, *flags), RANKS, SCRIPT)])
    found = [json.loads((out / f"{rank}.json").read_text()) for rank in range(RANKS) if not code]
    return code, output, found


def calls(found, *places):
    """How often a rank asked for what, below some folders; a link counts for what it leads to."""
    real = [os.path.realpath(place) for place in places]
    return Counter(
        (what, path)
        for what, path in ((what, os.path.realpath(path)) for what, path in found["calls"])
        if any(path == place or path.startswith(f"{place}{os.sep}") for place in real)
    )


def digest(folder):
    return hashlib.sha256((folder / ".metadata").read_bytes()).hexdigest()


def test_only_rank_0_looks_at_checkpoints_and_at_each_file_once(tiny, server, saved, tmp_path):
    code, output, found = start(tiny, server, saved, tmp_path)
    assert code == 0, output[-3000:]
    reference = tiny.base / f"iter_{20:07d}"
    # Of the folder that is saved to, Megatron's own parser and the check of --save are no part.
    for rank in range(1, RANKS):
        seen = calls(found[rank], saved, tiny.base, tiny.reference)
        assert {what for what, path in seen if path != str(saved)} == set(), f"rank {rank}"
        assert found[rank]["unpickled"] == 0
    seen = calls(found[0], saved, tiny.base, tiny.reference)
    for folder in (saved / f"iter_{STEPS:07d}", reference):
        assert seen["list", str(folder)] == 1
        for file in folder.glob("*.distcp"):
            assert seen["stat", str(file)] <= 1
    # Metadata are read by Python's slow unpickler once for each of both checkpoints, for all ranks.
    assert found[0]["unpickled"] == 2
    expected = {digest(saved / f"iter_{STEPS:07d}"), digest(reference)}
    assert [set(of["known"]) for of in found] == [expected] * RANKS


@pytest.mark.parametrize("launcher", ["torchrun", "srun"])
def test_all_ranks_go_back_to_the_same_checkpoint(tiny, server, saved, tmp_path, launcher):
    largest = max((saved / f"iter_{STEPS:07d}").glob("*.distcp"), key=lambda f: f.stat().st_size)
    os.truncate(largest, largest.stat().st_size - 1)
    code, output, found = start(tiny, server, saved, tmp_path, launcher)
    assert code == 0, output[-3000:]
    assert [of["ckpt_step"] for of in found] == [HALF] * RANKS
    assert output.count("going on from") == 1
    assert f"from iteration {HALF} of {saved} (--load)" in output
    for of in found[1:]:
        touched = {path for _, path in calls(of, saved) if path != str(saved)}
        marks = {saved / f"iter_{HALF:07d}" / MARKS[0], saved / "latest_checkpointed_iteration.txt"}
        # Without torchrun each rank looks whether it sees what rank 0 has found.
        assert touched == (set() if launcher == "torchrun" else {str(mark) for mark in marks})


@pytest.mark.parametrize("launcher", ["torchrun", "srun"])
def test_an_error_ends_all_ranks_and_is_one_line_a_node(tiny, server, saved, tmp_path, launcher):
    for iteration in (HALF, STEPS):
        (saved / f"iter_{iteration:07d}" / MARKS[0]).unlink()
    code, output, _ = start(tiny, server, saved, tmp_path, launcher)
    assert code == 2
    assert "Traceback" not in output
    lines = re.findall(r"error(?: \(rank \d\))?: (.*)", output)
    assert len(lines) == 1 if launcher == "torchrun" else 1 <= len(lines) <= RANKS
    (line,) = set(lines)
    assert "expected an older complete checkpoint to go on from, found none" in line
    assert f"iter_{HALF:07d}: metadata.json is missing" in line


def restarted(tmp_path, way, *, own_store):
    """What rank 1 hears in two starts by one torchrun."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", "--max-restarts", "1"]
    command += [str(ROOT / "tests" / "helpers" / "told_again.py"), str(tmp_path), way]
    # As examples/slurm/node.sh sets it: without it a group cannot be made again (torch 2.13).
    variables = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": str(int(own_store)), "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(
        command, cwd=ROOT, env=os.environ | variables, capture_output=True, text=True, timeout=300
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    return [json.loads((tmp_path / f"{start}.1.json").read_text()) for start in range(2)]


def test_a_restart_by_torchrun_hears_nothing_of_the_start_before(tmp_path):
    assert restarted(tmp_path, "group", own_store=True) == [0, 1]


def test_torchruns_store_holds_the_answer_of_the_start_before(tmp_path):
    """So none is asked for there: a rank that comes before rank 0 would take it for that of this start."""
    assert restarted(tmp_path, "store", own_store=False) == [None, 0]
