"""Which code ran: recorded on one rank, told in a line, compared at a resume."""

import logging
import subprocess
from argparse import Namespace
from types import SimpleNamespace

import pytest
import torch

from megatron_ext.checkpoint.source import Start
from megatron_ext.preflight import facts
from megatron_ext.runtime import software


@pytest.fixture
def recorded(monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    args = Namespace(rank=0)
    software.record(args)
    return args


def test_a_line_names_the_commit_versions_and_job(recorded):
    line = software.describe(recorded.software | {"commit": "abc", "edited": "yes"})
    assert line.startswith("software:  commit abc (edited), checkout ")
    assert line.endswith(", job 77")
    assert f"torch {torch.__version__.partition('+')[0]}" in line
    other = software.describe(recorded.software | {"edited": "no", "job": "none"})
    assert "edited" not in other
    assert "job" not in other


def test_all_ranks_have_what_rank_0_has_recorded(monkeypatch, recorded):
    def broadcast(objects, src):
        assert src == 0
        objects[0] = recorded.software

    monkeypatch.setattr(torch.distributed, "broadcast_object_list", broadcast)
    args = Namespace(rank=1)
    software.record(args)
    assert args.software is None
    software.share(args)
    assert args.software == recorded.software


def test_a_resume_tells_what_differs_and_nothing_else(recorded, caplog):
    def resume(args, before, *, resumed=True):
        saved = Namespace() if before is None else Namespace(software=before)
        checkpoint = SimpleNamespace(iteration=10, args=saved)
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            software.tell_changes(args, Start(checkpoint, "--load", resumed))
        return caplog.messages

    now = recorded.software
    old = now | {"torch": "2.11.0", "checkout": "0123", "job": "76", "edited": "unknown"}
    assert resume(recorded, old) == [
        f"software: until iteration 10 torch 2.11.0, now {now['torch']}; checkout 0123, now "
        f"{now['checkout']}"
    ]
    assert resume(recorded, now | {"job": "76"}) == []
    assert resume(recorded, {"commit": now["commit"]}) == []  # an older version recorded less
    assert resume(recorded, None) == []
    assert resume(recorded, old, resumed=False) == []
    assert resume(Namespace(rank=1, software=None), old) == []


def test_edits_are_noticed_and_nothing_is_claimed_without_git(monkeypatch, tmp_path):
    monkeypatch.setattr(facts, "ROOT", tmp_path)
    assert facts.edited() == "unknown"

    def git(*words):
        names = ("-c", "user.name=a", "-c", "user.email=a@b")
        subprocess.run(["git", "-C", tmp_path, *names, *words], check=True, capture_output=True)

    (tmp_path / "code.py").write_text("1\n")
    git("init")
    git("add", ".")
    git("commit", "-m", "first")
    (tmp_path / "output.log").write_text("")
    assert facts.edited() == "no"
    (tmp_path / "code.py").write_text("2\n")
    assert facts.edited() == "yes"
    monkeypatch.setenv("PATH", "")
    assert facts.edited() == "unknown"
