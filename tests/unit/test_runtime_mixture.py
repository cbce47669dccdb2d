"""Mixtures of experts in half precision, by Megatron's own classes without their devices."""

from types import SimpleNamespace

import pytest
import torch
from megatron.core.optimizer.grad_scaler import DynamicGradScaler
from megatron.core.optimizer.optimizer import ChainedOptimizer, MixedPrecisionOptimizer
from megatron.core.transformer.moe.router import TopKRouter

from megatron_ext.runtime import mixture

CONFIG = SimpleNamespace(timers=None)


def scaler(scale):
    """Megatron's, which halves at the first overflow and doubles after two steps without one."""
    found = object.__new__(DynamicGradScaler)
    found._scale = torch.tensor([scale])
    found.min_scale = torch.tensor([1.0])
    found.growth_factor, found.backoff_factor = torch.tensor([2.0]), torch.tensor([0.5])
    found.growth_interval, found.hysteresis = 2, 1
    found._growth_tracker, found._hysteresis_tracker = 0, 1
    return found


class Part:
    """A part of the optimizer, of which the test says whether its gradients overflow."""

    config, model_chunks, is_stub_optimizer = CONFIG, (), False
    prepare_grads = MixedPrecisionOptimizer.prepare_grads
    get_loss_scale = MixedPrecisionOptimizer.get_loss_scale

    def __init__(self, scale):
        self.grad_scaler = None if scale is None else scaler(scale)
        self.overflows = False

    def _copy_model_grads_to_main_grads(self):
        pass

    def _unscale_main_grads_and_check_for_nan(self):
        return self.overflows

    def load_state_dict(self, state):
        self.grad_scaler.load_state_dict(state)


@pytest.fixture
def patched(monkeypatch):
    for kind, name in (
        (ChainedOptimizer, "prepare_grads"),
        (ChainedOptimizer, "load_state_dict"),
        (TopKRouter, "_maintain_float32_expert_bias"),
    ):
        monkeypatch.setattr(kind, name, getattr(kind, name))
    monkeypatch.setattr(ChainedOptimizer, "_synchronize_steps", lambda self: None)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.Tensor, "cuda", lambda self, *_: self)
    mixture.share_loss_scale()
    mixture.count_in_fp32()


@pytest.mark.parametrize("which", [0, 1])
def test_an_overflow_of_one_part_skips_the_step_of_all_and_halves_the_scale_once(patched, which):
    parts = [Part(64.0), Part(64.0)]
    optimizer = ChainedOptimizer(parts)
    scales = []
    for overflows in (False, True, False, False, True, True):
        parts[which].overflows = overflows
        assert optimizer.prepare_grads() is overflows
        scales.append([float(part.get_loss_scale()) for part in parts])
    assert scales == [[s, s] for s in (64.0, 32.0, 32.0, 64.0, 32.0, 16.0)]
    trackers = [part.grad_scaler._growth_tracker for part in parts]
    assert trackers == [0, 0]


def test_without_a_scale_nothing_is_skipped(patched):
    assert ChainedOptimizer([Part(None), Part(None)]).prepare_grads() is False
    alone = Part(64.0)
    alone.overflows = True
    assert ChainedOptimizer([alone]).prepare_grads() is True
    assert float(alone.get_loss_scale()) == 32.0


def test_scales_that_an_older_run_let_drift_apart_are_one_again(patched):
    parts = [Part(1.0), Part(1.0)]
    states = [scaler(scale).state_dict() for scale in (512.0, 8.0)]
    states[1]["growth_tracker"] = 1
    ChainedOptimizer(parts).load_state_dict(dict(enumerate(states)))
    assert [part.grad_scaler.state_dict() for part in parts] == [states[1]] * 2


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_a_router_counts_on_beyond_the_numbers_of_half_precision(patched, half):
    router = object.__new__(TopKRouter)
    torch.nn.Module.__init__(router)
    names = ("local_tokens_per_expert", "global_tokens_per_expert", "ga_steps")
    for name in names:
        router.register_buffer(name, torch.zeros(2), persistent=False)
    router.register_buffer("expert_bias", torch.zeros(2), persistent=False)
    router.qb_beta = router.qb_beta_accum = None
    router.to(half)
    for tokens in (70_000, 1):
        router._maintain_float32_expert_bias()
        for name in names:
            getattr(router, name).add_(tokens)
    for name in names:
        assert getattr(router, name).tolist() == [70_001] * 2
    assert router.expert_bias.dtype == torch.float32  # which Megatron sees to by itself
    assert not router.state_dict()


def test_a_router_that_does_not_count_is_left_alone(patched):
    router = object.__new__(TopKRouter)
    torch.nn.Module.__init__(router)
    for name in ("local_tokens_per_expert", "global_tokens_per_expert", "ga_steps"):
        setattr(router, name, None)
    router._maintain_float32_expert_bias()
