"""Parameter all-gathers that are started before the model's forward pass."""

import types
import warnings

import pytest
import torch

from megatron_ext.runtime import gathers
from tests.helpers.distributed import run_ranks

SETTINGS = {
    "overlap_param_gather": True,
    "use_distributed_optimizer": True,
    "align_param_gather": False,
    "overlap_param_gather_with_optimizer_step": False,
}


def _trained(ahead: bool, experts: int | None) -> tuple[list[torch.Tensor], int]:
    """Parameters after some steps, and how many all-gathers were under way when a forward pass began."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

    from tests.helpers import models

    more = {} if experts is None else {"num_moe_experts": experts, "moe_router_topk": 2}
    model = models.gpt(models.config(**more), native=True)
    setup = DistributedDataParallelConfig(
        use_distributed_optimizer=True,
        overlap_grad_reduce=True,
        overlap_param_gather=True,
        bucket_size=2000,
    )
    wrapped = DistributedDataParallel(model.config, setup, model)
    config = OptimizerConfig(
        optimizer="adam", lr=1e-2, use_distributed_optimizer=True, overlap_param_gather=True
    )
    optimizer = get_megatron_optimizer(config, [wrapped])
    groups = wrapped.bucket_groups + wrapped.expert_parallel_bucket_groups
    args = types.SimpleNamespace(**SETTINGS)
    under_way = 0
    wrapped.disable_forward_pre_hook(param_sync=False)  # as in a run's first step
    for step in range(4):
        wrapped.zero_grad_buffer()
        optimizer.zero_grad()
        if ahead:
            gathers.gather_ahead(args, [wrapped])
        started = [group.param_gather_handle is not None for group in groups]
        assert not any(started) or step > 0
        assert not ahead or step == 0 or all(started)
        under_way = sum(started)
        models.loss_and_gradients(model, wrapped)
        assert optimizer.step()[0]
        if step == 0:
            wrapped.enable_forward_pre_hook()
    wrapped.disable_forward_pre_hook()
    return [p.detach().clone() for p in model.parameters()], under_way


def _both(experts: int | None) -> tuple[float, int, int]:
    from tests.helpers import models

    models.start(1)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*has already been dispatched")
        plain, none = _trained(False, experts)
        ahead, started = _trained(True, experts)
    apart = max(float((a - b).abs().max()) for a, b in zip(plain, ahead, strict=True))
    return apart, none, started


@pytest.mark.parametrize("experts", [None, 4], ids=["dense", "experts"])
def test_all_are_under_way_when_the_forward_pass_begins(experts):
    for apart, none, started in run_ranks(_both, 2, experts):
        assert apart == 0.0
        assert none == 0
        assert started > 3


class _Untouchable:
    def __getattr__(self, name):
        raise AssertionError(name)


@pytest.mark.parametrize(
    "change",
    [
        {"overlap_param_gather": False},
        {"use_distributed_optimizer": False},
        {"align_param_gather": True},
        {"overlap_param_gather_with_optimizer_step": True},
    ],
)
def test_what_megatron_starts_otherwise_is_left_to_it(change):
    gathers.gather_ahead(types.SimpleNamespace(**SETTINGS | change), [_Untouchable()])
