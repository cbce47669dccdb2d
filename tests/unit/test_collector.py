"""The garbage collector around imports."""

import gc
import sys
from types import ModuleType

import pytest

from megatron_ext.runtime import collector


@pytest.fixture
def thawed():
    """As it was before."""
    yield
    gc.freeze()  # see conftest.py
    gc.enable()


@pytest.mark.parametrize("imports", [True, False])
def test_is_off_meanwhile_and_freezes_what_was_imported(thawed, monkeypatch, imports):
    gc.unfreeze()
    with collector.paused():
        assert not gc.isenabled()
        made = [[] for _ in range(1000)]
        if imports:
            monkeypatch.setitem(sys.modules, "a_module_of_this_test", ModuleType("made"))
    assert gc.isenabled()
    assert (gc.get_freeze_count() > len(made)) == imports
    # What is frozen is in none of the generations that are collected.
    assert any(made[0] is other for other in gc.get_objects()) != imports


def test_an_import_that_fails_leaves_it_on(thawed):
    with pytest.raises(ImportError), collector.paused():
        import no_such_module  # noqa: F401
    assert gc.isenabled()
