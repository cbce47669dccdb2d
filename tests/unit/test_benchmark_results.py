"""The files that benchmarks leave: their names, and what is in all of them."""

import json
import shutil
import subprocess
import sys

import pytest
import torch

from benchmarks import layers, results_file


@pytest.fixture
def gpu(monkeypatch):
    """A machine that claims a GPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100 80GB HBM3")


@pytest.mark.parametrize(
    ("device", "name"),
    [
        ("2-core CPU", "cpu"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA GH200 480GB", "gh200"),
        ("NVIDIA L40S", "l40s"),
        ("AMD Instinct MI300X", "mi300x"),
        ("NVIDIA GeForce RTX 4090", "geforce-rtx-4090"),
    ],
)
def test_a_machine_is_called_by_its_model(device, name):
    assert results_file.machine(device) == name


def test_what_every_file_holds(tmp_path):
    environment = results_file.environment("head_phases", "cpu", ["--peers", "a b"], threads=3)
    path = results_file.write(tmp_path / "new", "head_phases", environment, [{"ms": 1}], "-1x2")
    assert path == tmp_path / "new" / "head-phases-cpu-1x2.json"
    assert path == results_file.path(tmp_path / "new", "head_phases", environment, "-1x2")
    report = json.loads(path.read_text())
    assert report == {"environment": environment, "rows": [{"ms": 1}]}
    assert environment["command"] == "python -m benchmarks.head_phases --peers 'a b'"
    assert environment["versions"]["torch"] == torch.__version__
    assert environment["versions"]["megatron-core"]
    assert environment["threads"] == 3
    assert environment["date"].endswith("+00:00")


@pytest.mark.skipif(not shutil.which("git"), reason="no git")
def test_the_commit_is_that_of_the_checkout(tmp_path, monkeypatch):
    monkeypatch.setattr(results_file, "ROOT", tmp_path)
    assert "commit" not in results_file.environment("step", "cpu")

    def git(*words):
        identity = ("-c", "user.name=a", "-c", "user.email=a@b.example")
        command = ["git", *identity, *words]
        done = subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True)
        return done.stdout.strip()

    results = tmp_path / "benchmarks" / "results"
    results.mkdir(parents=True)
    for file in (tmp_path / "code", results / "step-cpu.json"):
        file.write_text("one")
    git("init")
    git("add", ".")
    git("commit", "--message", "One")
    commit = git("rev-parse", "--short", "HEAD")
    (results / "step-cpu.json").write_text("two")  # by the benchmark before
    assert results_file.environment("step", "cpu")["commit"] == commit
    (tmp_path / "code").write_text("two")
    assert results_file.environment("step", "cpu")["commit"] == f"{commit}-dirty"
    monkeypatch.setenv("PATH", "")
    assert "commit" not in results_file.environment("step", "cpu")


def test_layers_writes_its_parts(gpu, monkeypatch, tmp_path):
    def parts():
        yield "one", lambda: None, 8.0, 0.0

    monkeypatch.setattr(layers, "_milliseconds", lambda run: 2.0)
    for name in ("_attention", "_rotation", "_elementwise", "_weight_gradient"):
        monkeypatch.setattr(layers, name, parts)
    layers.main(["--out", str(tmp_path)])
    report = json.loads((tmp_path / "layers-h100.json").read_text())
    assert report["environment"]["device"] == "NVIDIA H100 80GB HBM3"
    assert report["rows"] == 4 * [{"part": "one", "ms": 2.0, "bytes": 8.0, "flops": 0.0}]


def test_layers_says_that_it_needs_a_gpu(tmp_path):
    """It does not fail: `make bench` goes on."""
    command = [sys.executable, "-m", "benchmarks.layers", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=results_file.ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "benchmarks.layers: needs a GPU, found none; nothing is measured\n"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("flags", "suffix"), [([], ""), (["--tokens", "64"], "-64x2048x131072")])
def test_head_phases_names_another_shape(flags, suffix, gpu, monkeypatch, tmp_path):
    pytest.importorskip("triton")
    from benchmarks import head_phases

    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    row = {"phase": "one", "ms": 1.0}
    for name in ("measure", "whole", "overlap"):
        monkeypatch.setattr(head_phases, name, lambda *size, **options: [row])
    head_phases.main([*flags, "--out", str(tmp_path)])
    report = json.loads((tmp_path / f"head-phases-h100{suffix}.json").read_text())
    assert report["rows"] == 5 * [row]
    assert report["environment"]["shape"].endswith("x 2048 hidden x 131,072 columns")
