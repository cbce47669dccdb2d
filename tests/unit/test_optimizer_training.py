"""Training with torch's kernels in the slots of Megatron's optimizer."""

import torch

from megatron_ext.runtime import optimizer as kernels
from tests.helpers.distributed import run_ranks


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
