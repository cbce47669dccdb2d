"""Checkpoints of pipeline stages that have no parameter of some group, or no experts.

Megatron gives all ranks the same groups of parameters, empty where a stage has none of a group: the first
stage of ``E|tttL`` has no norms, the last one of ``Ettt|L`` with ``--decoupled-lr`` no other weights. With
expert parallelism the experts have an optimizer of their own, which has no parameter at all on a stage of
dense layers. Two things in a checkpoint then go wrong:

- The fp32 weights of half-precision training are a list of groups, from which Megatron leaves out the empty
  ones when it loads. The others move up, so a weight gets the values of another group, or, if the first rank
  has an empty group, the load fails.
- The step of an optimizer is the first rank's. If that has no parameter it knows none, and Adam's bias
  correction starts anew on resume, or, with torch's Adam in the distributed optimizer, an assertion fails.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch

_WEIGHTS = "fp32_from_fp16_params"
_NO_PARAMETER = "no parameter"  # in torch's state, in place of a parameter


def enable(replace: Callable[[Any, str, Any], None]) -> None:
    """Put this around Megatron's optimizers.

    Args:
        replace: sets an attribute of a class.
    """
    from megatron.core.optimizer.optimizer import (
        ChainedOptimizer,
        Float16OptimizerWithFloat16Params,
        FP32Optimizer,
    )

    for kind in (Float16OptimizerWithFloat16Params, FP32Optimizer):
        replace(kind, "sharded_state_dict", _numbering(kind.sharded_state_dict))
        replace(kind, "load_state_dict", _completing(kind.load_state_dict))
    replace(ChainedOptimizer, "sharded_state_dict", _in_step(ChainedOptimizer.sharded_state_dict))


def _numbering(sharded_state_dict: Callable[..., Any]) -> Callable[..., Any]:
    def sharded_state_dict_by_group(self: Any, *args: Any, **kwargs: Any) -> Any:
        state = sharded_state_dict(self, *args, **kwargs)
        # Its step is the common one by now.
        state.get("optimizer", state)["state"].pop(_NO_PARAMETER, None)
        if _WEIGHTS in state:
            state[_WEIGHTS] = {i: group for i, group in enumerate(state[_WEIGHTS]) if group}
        return state

    return sharded_state_dict_by_group


def _completing(load: Callable[..., None]) -> Callable[..., None]:
    """What of a checkpoint is empty on this rank is not in what was loaded."""

    def load_state_dict_by_group(self: Any, state_dict: dict[str, Any]) -> None:
        state_dict.get("optimizer", state_dict).setdefault("state", {})  # of SGD it has no step
        weights = state_dict.get(_WEIGHTS, {})
        groups = getattr(self, "fp32_from_float16_groups", None)
        if groups is not None and isinstance(weights, dict):
            state_dict[_WEIGHTS] = [weights.get(i, []) for i in range(len(groups))]
        load(self, state_dict)

    return load_state_dict_by_group


def _in_step(sharded_state_dict: Callable[..., Any]) -> Callable[..., Any]:
    def sharded_state_dict_in_step(self: Any, *args: Any, **kwargs: Any) -> Any:
        chained = [chained.optimizer for chained in self.chained_optimizers]
        share_step([optimizer for optimizer in chained if optimizer is not None])
        return sharded_state_dict(self, *args, **kwargs)

    return sharded_state_dict_in_step


def share_step(optimizers: Sequence[torch.optim.Optimizer]) -> None:
    """Give those without parameters the step of the others, which is theirs too.

    Args:
        optimizers: all of a rank; each of them has made the same steps.
    """
    empty = [each for each in optimizers if not any(g["params"] for g in each.param_groups)]
    step = next((s for each in optimizers if each not in empty for s in _steps(each)), None)
    for optimizer in empty:
        if isinstance(optimizer, torch.optim.Adam | torch.optim.AdamW):
            state: dict[Any, Any] = optimizer.state
            state[_NO_PARAMETER] = {"step": torch.as_tensor(step or 0.0, dtype=torch.float32)}
        elif step is not None:
            for group in optimizer.param_groups:
                group["step"] = step


def _steps(optimizer: torch.optim.Optimizer) -> list[Any]:
    """The step of each parameter, or of each group."""
    places = (*optimizer.state.values(), *optimizer.param_groups)
    return [place["step"] for place in places if "step" in place]
