"""What `benchmarks.step` builds on a GPU, as far as a CPU can tell."""

from types import SimpleNamespace

from benchmarks import step_models
from benchmarks.step_models import Trainer
from benchmarks.step_variants import SMALL, Variant


def test_the_reference_is_built_without_fused_gradients(monkeypatch):
    """Those are on on a GPU, and Megatron's layers refuse them outside of the variant's own kernels."""
    built, config = [], SimpleNamespace(gradient_accumulation_fusion=True)
    monkeypatch.setattr(step_models, "_gpt", lambda config, *_: built.append(config))
    monkeypatch.setattr(step_models, "get_forward_backward_func", lambda: None)
    step = SimpleNamespace(forward_step=None, forward_backward=print)
    monkeypatch.setattr(step_models, "unlearn_step", lambda *_: step)
    trainer = object.__new__(Trainer)
    trainer.shape, trainer.config = SMALL, config
    trainer.variant = Variant("unlearn", native=True, unlearn=True)
    monkeypatch.setattr(Trainer, "_batches", lambda self: iter(()))
    trainer._choose_step()
    assert [reference.gradient_accumulation_fusion for reference in built] == [False]
    assert config.gradient_accumulation_fusion
