# ruff: noqa: E402
import gc
import os
from collections.abc import Iterator
from pathlib import Path

# Of every test and all that it starts, before torch is imported: the tensors are tiny, several processes
# share the cores, and threads that wait for a busy core take 10 ms a product.
os.environ["OMP_NUM_THREADS"] = "1"
gc.disable()  # until all is imported

import pytest
import torch

from megatron_ext.runtime import cpu
from tests.helpers import tiny as tiny_world
from tests.helpers.forked import Server


def pytest_configure(config: pytest.Config) -> None:
    """Run on the CPU on every machine: several ranks would need several GPUs. `-m gpu` are the others.

    Before any test module imports Megatron.
    """
    if config.option.markexpr != "gpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    if not torch.cuda.is_available():
        cpu.hide_packages()


def pytest_collection_finish() -> None:
    """Look for garbage among what tests make, not among all that was imported."""
    gc.freeze()
    gc.enable()


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tiny_world.Tiny:
    """Tokenised text and a base model, made once for all tests (about 20 s)."""
    return tiny_world.build(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def runs_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where runs write what no other test reads."""
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="session")
def server() -> Iterator[Server]:
    """Starts runs without the cost of a start."""
    server = Server()
    yield server
    server.close()
