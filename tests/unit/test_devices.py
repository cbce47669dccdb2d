"""GPUs that cannot be used are named, where the run would have gone to the CPU without a word."""

import subprocess
import sys
import types

import pytest
import torch

from megatron_ext.exceptions import ConfigError, first_line
from megatron_ext.preflight import facts
from megatron_ext.runtime import devices


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """A machine whose torch sees no GPU, and where nobody has hidden one."""
    monkeypatch.setattr(devices, "_FILES", tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    for name in devices._ALLOTTED:
        monkeypatch.delenv(name, raising=False)
    return tmp_path


@pytest.mark.parametrize("variables", [{}, {"SLURM_GPUS_ON_NODE": "0"}, {"SLURM_JOB_GPUS": ""}])
def test_a_machine_without_gpus_computes_on_its_cpu(machine, monkeypatch, variables):
    (machine / "nvidiactl").touch()
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    devices.check_gpus()


def test_a_driver_that_failed_is_named(machine):
    (machine / "nvidia0").touch()
    with pytest.raises(
        ConfigError, match=r"expected GPUs, for there is .*nvidia0; found that torch"
    ):
        devices.check_gpus()


@pytest.mark.parametrize("name", devices._ALLOTTED)
def test_gpus_of_a_job_that_are_not_there_are_named(machine, monkeypatch, name):
    monkeypatch.setenv(name, "8")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3,4,5,6,7")  # as Slurm sets it
    with pytest.raises(ConfigError, match=rf"{name}=8; .* with CUDA_VISIBLE_DEVICES= set to noth"):
        devices.check_gpus()


@pytest.mark.parametrize("hidden", ["", "-1", "NoDevFiles"])
def test_hidden_gpus_are_left_alone(machine, monkeypatch, hidden):
    (machine / "nvidia0").touch()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
    devices.check_gpus()


def test_the_reason_is_torchs_own(machine, monkeypatch):
    (machine / "nvidia0").touch()

    def start():
        raise RuntimeError("The NVIDIA driver on your system is too old\nmore")

    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch._C, "_cuda_init", start, raising=False)
    with pytest.raises(ConfigError, match=r"\(The NVIDIA driver on your system is too old\)"):
        devices.check_gpus()
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(ConfigError, match=r"\(it was built for CPUs alone\)"):
        devices.check_gpus()


@pytest.mark.parametrize("error", ["undefined symbol: _ZN3c10", "libcudart.so.12: cannot open"])
def test_a_transformer_engine_for_another_torch_is_named(tmp_path, monkeypatch, error):
    package = tmp_path / "transformer_engine" / "pytorch"
    package.mkdir(parents=True)
    (package.parent / "__init__.py").touch()
    (package / "__init__.py").write_text(f"raise ImportError({error!r})")
    monkeypatch.syspath_prepend(str(tmp_path))
    hidden = [name for name in sys.modules if name.split(".")[0] == "transformer_engine"]
    for name in hidden:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(ConfigError, match=rf"{error}.*pip install --no-build-isolation"):
        devices.check_packages()
    sys.modules.pop("transformer_engine", None)


def test_a_machine_without_transformer_engine_needs_none(monkeypatch):
    monkeypatch.setattr(devices.importlib.util, "find_spec", lambda name: None)
    devices.check_packages()


def test_a_transformer_engine_that_imports_is_taken(monkeypatch):
    monkeypatch.setattr(devices.importlib.util, "find_spec", lambda name: types.SimpleNamespace())
    for name in ("transformer_engine", "transformer_engine.pytorch"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    devices.check_packages()


def test_an_error_that_says_nothing_is_told_by_its_kind(monkeypatch):
    assert first_line(RuntimeError()) == "RuntimeError"
    assert first_line(OSError("no device\nand much more")) == "no device"
    silent = subprocess.CompletedProcess([], 9, stdout="", stderr="\n")
    monkeypatch.setattr(facts.shutil, "which", lambda _: "nvidia-smi")
    monkeypatch.setattr(facts.subprocess, "run", lambda *_, **__: silent)
    assert facts.driver() == [{"error": "nvidia-smi ended with exit code 9"}]
