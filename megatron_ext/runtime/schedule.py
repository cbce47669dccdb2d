"""Another learning rate or weight decay on resume, as the flags that Megatron has for it promise.

Megatron keeps the highest and lowest learning rate in every group of parameters as well, and finds a group
again by them: after a change of ``--lr`` or ``--min-lr`` no group is found, whether
``--override-opt-param-scheduler`` or ``--use-checkpoint-opt-param-scheduler`` is given.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

_RATES = ("max_lr", "min_lr")


def enable() -> None:
    """Wrap the loads of Megatron's optimizers and of its scheduler; called once before training."""
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
    from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params, FP32Optimizer
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

    for kind in (FP32Optimizer, Float16OptimizerWithFloat16Params, DistributedOptimizer):
        kind.load_state_dict = _with_rates(kind.load_state_dict)

    load = OptimizerParamScheduler.load_state_dict

    def load_and_apply(self: Any, state: dict[str, Any]) -> None:
        load(self, state)
        # Megatron sets the groups before it has read the weight decay: one step would have that of the flags.
        self.step(increment=0)

    OptimizerParamScheduler.load_state_dict = load_and_apply


def _with_rates(load: Callable[..., None]) -> Callable[..., None]:
    from megatron.training import get_args

    def load_state_dict(self: Any, state_dict: dict[str, Any]) -> None:
        args = get_args()
        if self.optimizer is not None:
            saved = state_dict.get("optimizer", state_dict)["param_groups"]
            if args.override_opt_param_scheduler:
                take_rates(saved, self.optimizer.param_groups)
            elif args.use_checkpoint_opt_param_scheduler:
                take_rates(self.optimizer.param_groups, saved)
        load(self, state_dict)

    return load_state_dict


def take_rates(groups: Sequence[dict[str, Any]], source: Sequence[dict[str, Any]]) -> None:
    """Give groups of parameters, in place, the learning rates of others of their kind.

    Args:
        groups: Megatron's groups; where a kind has several rates they are left alone.
        source: the groups that have the rates.
    """
    rates: dict[tuple[Any, ...], list[dict[str, Any]]] = defaultdict(list)
    for group in source:
        found = {name: group[name] for name in _RATES if name in group}
        if found not in rates[_kind(group)]:
            rates[_kind(group)].append(found)
    for group in groups:
        if len(rates[_kind(group)]) == 1:
            group |= rates[_kind(group)][0]


def _kind(group: dict[str, Any]) -> tuple[Any, ...]:
    """What Megatron tells groups apart by, but for their learning rates."""
    from megatron.core.optimizer.optimizer import param_group_identifier_keys

    return tuple(group.get(key) for key in param_group_identifier_keys if key not in _RATES)
