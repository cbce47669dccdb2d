"""Extra states of fp8 are read as data."""

import os
import pickle
import sys
from types import ModuleType

import pytest
import torch

from megatron_ext.checkpoint.safe_load import enable_for_extra_states

ALLOW = "NVTE_ALLOW_UNSAFE_PICKLE_EXTRA_STATE"


@pytest.fixture
def reader(monkeypatch):
    """A module of Transformer Engine that has been imported."""
    module = ModuleType("transformer_engine.pytorch.module.base")
    module.pickle = pickle
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.delenv(ALLOW, raising=False)
    yield module
    os.environ.pop(ALLOW, None)


class Evil:
    """Runs code where it is unpickled."""

    def __reduce__(self):
        return os.putenv, ("CODE", "has run")


def test_tensors_and_numbers_are_read(reader):
    enable_for_extra_states()
    state = {"scale_fwd": torch.ones(3), "extra_fp8_variables": {"num_gemms": 1}}
    found = reader.pickle.loads(reader.pickle.dumps(state))
    assert found["scale_fwd"].tolist() == [1, 1, 1]
    assert found["extra_fp8_variables"] == {"num_gemms": 1}
    assert os.environ[ALLOW] == "1"


def test_code_is_not_run(reader):
    data = pickle.dumps({"recipe": Evil()})
    assert pickle.loads(data) == {"recipe": None}  # it would
    enable_for_extra_states()
    with pytest.raises(pickle.UnpicklingError, match="putenv"):
        reader.pickle.loads(data)


def test_without_transformer_engine_nothing_is_allowed(monkeypatch):
    monkeypatch.delenv(ALLOW, raising=False)
    assert "transformer_engine.pytorch.module.base" not in sys.modules
    enable_for_extra_states()
    assert ALLOW not in os.environ
