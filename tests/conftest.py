from pathlib import Path

import pytest

from tests.helpers import tiny as tiny_world


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tiny_world.Tiny:
    """Tokenised text and a base model, made once for all tests (about 20 s)."""
    return tiny_world.build(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def runs_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where runs write what no other test reads."""
    return tmp_path_factory.mktemp("runs")
