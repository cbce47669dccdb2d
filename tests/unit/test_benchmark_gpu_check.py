"""`make gpu-check` with parts that pass, fail and hang, on a machine that claims a GPU."""

import json
import time

import psutil
import pytest
import torch

from benchmarks import gpu_check
from benchmarks.gpu_check import ROOT, Part

SLEEPS = "import subprocess, sys, time; print('begun', flush=True); "
SLEEPS += "p = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)']); "
SLEEPS += "print(p.pid, flush=True); time.sleep(600)"
PARTS = (
    Part("good", "passes", ("-c", "import os; print(os.environ['WHICH'])"), 60, {"WHICH": "this"}),
    Part("bad", "fails", ("-c", "print('no good'); raise SystemExit(3)"), 60),
    Part("slow", "hangs", ("-c", SLEEPS), 3),
    Part("timed", "knows its time", ("-c", "import sys; print(sys.argv)", gpu_check.SHARE), 100),
)


@pytest.fixture
def machine(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu_check, "environment", lambda: {"device": "H200"})
    monkeypatch.setattr(gpu_check, "parts", lambda out: list(PARTS))


def test_goes_on_after_what_fails_and_ends_what_hangs(machine, tmp_path, capsys):
    assert gpu_check.main(["--out", str(tmp_path)]) == 1
    report = json.loads((tmp_path / "gpu-check-h200.json").read_text())
    assert report["environment"] == {"device": "H200"}
    results = {row["part"]: row["result"] for row in report["rows"]}
    assert results == {
        "good": "passed",
        "bad": "failed with exit code 3",
        "slow": "stopped after 3 s",
        "timed": "passed",
    }
    assert (tmp_path / "good.log").read_text() == "this\n"
    assert (tmp_path / "timed.log").read_text() == "['-c', '60']\n"
    shown = capsys.readouterr().out
    assert "$ WHICH=this python -c" in shown
    assert "no good" in shown
    # What it had started has ended as well.
    child = int((tmp_path / "slow.log").read_text().split()[1])
    deadline = time.monotonic() + 10
    while psutil.pid_exists(child) and psutil.Process(child).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_starts_nothing_without_time(machine, tmp_path):
    assert gpu_check.main(["--out", str(tmp_path), "--minutes", "0.2", "--only", "good"]) == 1
    (row,) = json.loads((tmp_path / "gpu-check-h200.json").read_text())["rows"]
    assert row["result"] == "not started: the time was up"


def test_passes_when_all_that_was_chosen_has(machine, tmp_path):
    assert gpu_check.main(["--out", str(tmp_path), "--only", "good", "timed"]) == 0


def test_its_commands_can_be_started(tmp_path):
    """Every module and file that it names is there; names are those of `--only`."""
    for part in gpu_check.parts(tmp_path):
        module = part.command[1] if part.command[0] == "-m" else part.command[0]
        path = ROOT / (module.replace(".", "/") + ".py")
        assert module == "pytest" or path.is_file() or (ROOT / module).is_file()
        for word in part.command:
            assert not word.startswith("tests/") or (ROOT / word).exists()


def test_runs_every_test_that_needs_a_gpu():
    files = (ROOT / "tests").rglob("test_*.py")
    marked = {str(f.relative_to(ROOT)) for f in files if "pytest.mark" + ".gpu" in f.read_text()}
    assert {*gpu_check.KERNEL_TESTS, *gpu_check.ENTRY_TESTS} == marked


def test_needs_a_gpu(tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        gpu_check.main(["--out", str(tmp_path / "none")])
    assert ended.value.code == 2
    assert "expected a CUDA device, found none" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()
