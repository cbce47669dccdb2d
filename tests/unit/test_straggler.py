"""`--log-straggler` times each read and each forward pass, of plain steps and of unlearning."""

from argparse import Namespace
from types import SimpleNamespace

import megatron.training.training as loop
import pytest

from megatron_ext import plain, training
from megatron_ext.config import UnlearnConfig
from megatron_ext.data.batch import MicroBatch
from megatron_ext.plain import PlainStep
from megatron_ext.training import UnlearnStep


class Detector:
    """Notes what happens inside of it and what outside, as Megatron's would time it."""

    def __init__(self):
        self.inside = None
        self.events = []

    def __call__(self, bdata=False):
        self.inside = "reading" if bdata else "model"
        return self

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.inside = None

    def note(self, what):
        self.events.append((what, self.inside))


@pytest.fixture
def detector(monkeypatch):
    found = Detector()
    monkeypatch.setattr(loop, "stimer", found)
    timer = SimpleNamespace(start=lambda: None, stop=lambda: None)
    for module in (plain, training):
        monkeypatch.setattr(module, "get_timers", lambda: lambda *_, **__: timer)
        monkeypatch.setattr(module, "get_attr_wrapped_model", lambda *_: None)
        monkeypatch.setattr(module, "read_micro_batch", lambda *_, **__: read(found))
    return found


def read(detector):
    detector.note("read")
    return MicroBatch()


class Model:
    training = True

    def __init__(self, detector):
        self.detector = detector

    def __call__(self, *_, **__):
        self.detector.note("forward")


@pytest.mark.parametrize("on", [True, False])
@pytest.mark.parametrize("kind", ["plain", "unlearning"])
def test_reading_and_forward_passes_are_timed_where_it_is_asked_for(detector, kind, on):
    args = Namespace(log_straggler=on, micro_batch_size=1)
    model = Model(detector)
    if kind == "plain":
        step = PlainStep(args)
        step.guard = SimpleNamespace(begin=lambda *_: 0)
        step.forward_step(None, model)
    else:
        step = UnlearnStep(args, UnlearnConfig(), reference=lambda: None)
        step.guard = SimpleNamespace(begin=lambda *_: 0)
        [[batch]] = step._read(None, [model], 1, 0, 1)
        step.forward_step(iter([batch]), model)
    read, forward = ("reading", "model") if on else (None, None)
    assert detector.events == [("read", read), ("forward", forward)]
