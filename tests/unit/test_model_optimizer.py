"""torch's fused optimizer kernels in Megatron's slots: same numbers, and slots given back."""

import copy

import pytest
import torch

from megatron_ext.runtime import optimizer as kernels
from tests.helpers.distributed import run_ranks


def _train(optimizer, parameters, steps, *, seed, fused):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        for parameter in parameters:
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        if fused:
            assert kernels.use_fused_adam(optimizer)
        optimizer.step()


def _parameters():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator) for shape in ((5, 3), (7,), (1,))]


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW])
def test_fused_steps_equal_unfused_ones(kind):
    results = []
    for fused in (False, True):
        parameters = [p.requires_grad_() for p in _parameters()]
        optimizer = kind(parameters, lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1)
        _train(optimizer, parameters, 6, seed=1, fused=fused)
        results.append([p.detach() for p in parameters])
        assert bool(optimizer.param_groups[0].get("fused")) is fused
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=1e-6)


def test_a_checkpoint_of_an_unfused_run_goes_on():
    parameters = [p.requires_grad_() for p in _parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    _train(optimizer, parameters, 3, seed=1, fused=False)
    resumed = [p.detach().clone().requires_grad_() for p in parameters]
    other = torch.optim.AdamW(resumed, lr=1e-2)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    _train(optimizer, parameters, 3, seed=2, fused=False)
    _train(other, resumed, 3, seed=2, fused=True)
    torch.testing.assert_close(resumed, parameters, rtol=0, atol=1e-6)


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_counter_shared_by_all_parameters_counts_once(fused):
    """Megatron's distributed optimizer loads one tensor for all; untreated it counts thrice."""
    parameters = [p.requires_grad_() for p in _parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    _train(optimizer, parameters, 2, seed=1, fused=False)
    shared = torch.tensor(2.0)
    for state in optimizer.state.values():
        state["step"] = shared
    _train(optimizer, parameters, 4, seed=2, fused=fused)
    counts = {float(state["step"]) for state in optimizer.state.values()}
    assert counts == ({6.0} if fused else {2.0 + 4 * len(parameters)})


def test_other_optimizers_are_left_alone():
    optimizer = torch.optim.SGD([torch.zeros(2, requires_grad=True)], lr=1.0)
    before = set(optimizer.param_groups[0])
    assert not kernels.use_fused_adam(optimizer)
    assert set(optimizer.param_groups[0]) == before


def test_norm_and_scale_equal_plain_ones():
    tensors = [t * 10.0**i for i, t in enumerate([*_parameters(), torch.zeros(0)])]
    exact = torch.cat([t.flatten() for t in tensors]).double().norm()
    norm, nothing = kernels.l2_norm(0, torch.zeros(1), [tensors], False)
    assert norm.shape == (1,)
    assert nothing is None
    torch.testing.assert_close(norm[0].double(), exact, rtol=1e-6, atol=0)

    expected = [t * 0.25 for t in tensors]
    targets = [torch.full_like(t, torch.nan) for t in tensors]
    kernels.scale(0, torch.zeros(1), [tensors, targets], 0.25)
    torch.testing.assert_close(targets, expected)
    kernels.scale(0, torch.zeros(1), [tensors, tensors], 0.25)
    torch.testing.assert_close(tensors, expected)


def test_norm_of_half_precision_gradients_is_not_rounded_to_their_type():
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(n, generator=generator).bfloat16() for n in (1000, 37)]
    exact = torch.cat(tensors).double().norm()
    norm, _ = kernels.l2_norm(0, torch.zeros(1), [tensors], False)
    assert norm.dtype == torch.float32
    torch.testing.assert_close(norm[0].double(), exact, rtol=1e-6, atol=0)


def _parameters_after_training(accelerate: bool, distributed_optimizer: bool) -> list[torch.Tensor]:
    from tests.helpers import models

    models.start(1)
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.optimizer import OptimizerConfig, clip_grads, get_megatron_optimizer
    from megatron.core.tensor_parallel import layers
    from megatron.core.utils import local_multi_tensor_l2_norm

    undo = kernels.enable() if accelerate else None
    model = models.gpt(models.config(gradient_accumulation_fusion=accelerate), native=True)
    wrapped = DistributedDataParallel(
        model.config,
        DistributedDataParallelConfig(use_distributed_optimizer=distributed_optimizer),
        model,
    )
    config = OptimizerConfig(
        optimizer="adam",
        lr=1e-2,
        clip_grad=0.5,
        use_distributed_optimizer=distributed_optimizer,
    )
    optimizer = get_megatron_optimizer(config, [wrapped])
    for _ in range(3):
        optimizer.zero_grad()
        models.loss_and_gradients(model, wrapped)
        assert optimizer.step()[0]
    if undo is not None:
        assert clip_grads.l2_norm_impl is kernels.l2_norm
        undo()
    assert clip_grads.l2_norm_impl is local_multi_tensor_l2_norm
    assert not layers._grad_accum_fusion_available
    return [p.detach().clone() for p in model.parameters()]


def _trained() -> float:
    stock, ours, sharded = (
        _parameters_after_training(accelerate, distributed_optimizer)
        for accelerate, distributed_optimizer in ((False, False), (True, False), (True, True))
    )
    return max(
        float((a - b).abs().max())
        for other in (ours, sharded)
        for a, b in zip(stock, other, strict=True)
    )


def test_training_with_megatrons_optimizer_gives_the_same_parameters():
    # Three Adam steps of 1e-2; where a gradient is near zero, its rounding moves the step by parts.
    assert max(run_ranks(_trained, 2)) < 1e-4
