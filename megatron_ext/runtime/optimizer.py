"""Fused optimizer arithmetic from torch, where neither Transformer Engine nor Apex is installed.

Megatron then falls back to `torch.optim.AdamW` without `fused=True`, to a gradient norm with one
host synchronisation a tensor, to clipping through a temporary copy of every gradient, and it
refuses `--gradient-accumulation-fusion`. torch has kernels for all four; `enable` puts them in
Megatron's own slots for such kernels. The mathematics and the checkpoints do not change.
"""

from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_pre_hook

from megatron_ext.runtime import empty_groups

# Optimizers that have made their first step since their state was loaded.
_fused: WeakSet[torch.optim.Optimizer] = WeakSet()


def use_fused_adam(optimizer: torch.optim.Optimizer) -> bool:
    """Switch a torch Adam or AdamW over to its single-kernel step.

    Safe at any time, also after a checkpoint of an unfused run was loaded: the moments are the
    same, only the step counter moves to the parameter's device. Each parameter gets a counter of
    its own on the way: on resume, Megatron's distributed optimizer gives one tensor to all of them
    (`load_state_dict`, where neither Transformer Engine nor Apex is installed), which then counts
    every parameter as a step.

    Args:
        optimizer: Any optimizer; others than torch's own Adam and AdamW are left alone.

    Returns:
        Whether it is fused now.
    """
    if type(optimizer) not in (torch.optim.Adam, torch.optim.AdamW):
        return False
    seen: set[int] = set()
    for group in optimizer.param_groups:
        group["fused"], group["foreach"] = True, False
        for parameter in group["params"]:
            state = optimizer.state.get(parameter, {})
            if "step" not in state:
                continue
            step = torch.as_tensor(state["step"], dtype=torch.float32, device=parameter.device)
            state["step"] = step.clone() if id(step) in seen else step
            seen.add(id(state["step"]))
    return True


def l2_norm(
    chunk_size: int, noop_flag: Tensor, tensor_lists: list[list[Tensor]], per_tensor: bool
) -> tuple[Tensor, None]:
    """L2 norm `[1]` of all tensors together, without leaving their device.

    Signature of Apex's `multi_tensor_l2norm`, of which Megatron uses the first result only.
    """
    # In fp32 throughout: a norm in the gradients' bf16 would be off by up to 0.4%, and clipping with it.
    norms = torch._foreach_norm(tensor_lists[0], dtype=torch.float32)
    return torch.linalg.vector_norm(torch.stack(norms)).reshape(1), None


def scale(
    chunk_size: int, noop_flag: Tensor, tensor_lists: list[list[Tensor]], factor: float
) -> None:
    """Write `factor` times the first list into the second; in place where they are the same."""
    sources, targets = tensor_lists
    if not targets:  # on a rank of whose parameters none has a gradient
        return
    if all(a.data_ptr() == b.data_ptr() for a, b in zip(sources, targets, strict=True)):
        torch._foreach_mul_(targets, factor)
    else:
        torch._foreach_copy_(targets, torch._foreach_mul(sources, factor))


class _WeightGradient:
    """Stands in for Apex's `fused_weight_gradient_mlp_cuda`: `main_grad += grad.T @ input`.

    Without it each microbatch writes the weight's gradient in bf16, reads it back and adds it to
    the fp32 buffer; here the product accumulates in fp32 and never leaves the kernel.
    """

    @staticmethod
    def wgrad_gemm_accum_fp32(inputs: Tensor, grad_output: Tensor, main_grad: Tensor) -> None:
        """Accumulate into an fp32 buffer; `inputs` `[n, in]`, `grad_output` `[n, out]`."""
        if inputs.dtype == torch.float32 or not inputs.is_cuda:
            main_grad.addmm_(grad_output.t().to(main_grad.dtype), inputs.to(main_grad.dtype))
            return
        torch.addmm(main_grad, grad_output.t(), inputs, out_dtype=main_grad.dtype, out=main_grad)

    @staticmethod
    def wgrad_gemm_accum_fp16(inputs: Tensor, grad_output: Tensor, main_grad: Tensor) -> None:
        """Accumulate into a buffer of the inputs' own half precision."""
        main_grad.addmm_(grad_output.t(), inputs)


def enable() -> Callable[[], None]:
    """Use torch's kernels wherever Megatron found no others; call before building the model.

    Leaves a slot alone that Transformer Engine or Apex has filled.

    Returns:
        A function that gives Megatron its own fallbacks back, for comparisons.
    """
    import megatron.core.optimizer as optimizers
    import megatron.core.optimizer.clip_grads as clip_grads
    import megatron.core.tensor_parallel.layers as layers
    import megatron.core.utils as utils

    undo = ExitStack()
    _share_checkpoints(undo)
    _make_whole_resumable(undo)
    empty_groups.enable(partial(_replace, undo))
    if optimizers.USING_PYTORCH_OPTIMIZER:
        undo.callback(register_optimizer_step_pre_hook(_fuse_before_step).remove)
        _make_resumable(undo)
    if clip_grads.l2_norm_impl is utils.local_multi_tensor_l2_norm:
        _replace(undo, clip_grads, "l2_norm_impl", l2_norm)
    if clip_grads.multi_tensor_scale_impl is utils.local_multi_tensor_scale:
        _replace(undo, clip_grads, "multi_tensor_scale_impl", scale)
    if not layers._grad_accum_fusion_available:
        _replace(undo, layers, "_grad_accum_fusion_available", True)
        _replace(undo, layers, "fused_weight_gradient_mlp_cuda", _WeightGradient)
    return undo.close


def _make_resumable(undo: ExitStack) -> None:
    """Let the distributed optimizer resume with torch's Adam, whose step is a tensor of each parameter.

    Three things in Megatron's way of loading stand against it. To learn which tensors a checkpoint has to
    fill, it asks the new optimizer for its state and asserts that all parameters share one step; before the
    first step there is none (zero moments at step 0 answer, and the checkpoint overwrites them). They are
    also what is saved where each step so far was skipped, as fp16's first ones are. The step, restored from
    the parameter groups, is then overwritten by the one of that answer, or looked for in vain. And in an fp32
    run the weights are copied in place into parameters that require a gradient, which torch refuses outside
    ``no_grad``.
    """
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    sharded_state_dict = DistributedOptimizer.sharded_state_dict
    set_states = DistributedOptimizer._set_main_param_and_optimizer_states

    def sharded_state_dict_of_filled(
        self: DistributedOptimizer,
        model_state: Any = None,
        is_loading: bool = False,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        begin(self.optimizer)
        return sharded_state_dict(self, model_state or {}, is_loading, *args, **kwargs)

    def set_states_but_step(
        self: DistributedOptimizer, parameter: Tensor, tensors: dict[str, Any]
    ) -> None:
        group, order = self.model_param_group_index_map[parameter]
        state = self.optimizer.state[self.optimizer.param_groups[group]["params"][order]]
        set_states(self, parameter, tensors | {k: state[k] for k in ("step",) if k in state})

    load = torch.no_grad()(DistributedOptimizer.load_state_dict)
    _replace(undo, DistributedOptimizer, "sharded_state_dict", sharded_state_dict_of_filled)
    _replace(
        undo, DistributedOptimizer, "_set_main_param_and_optimizer_states", set_states_but_step
    )
    _replace(undo, DistributedOptimizer, "load_state_dict", load)


def begin(optimizer: torch.optim.Optimizer) -> None:
    """Give each parameter of torch's Adam, before the first step, the state that this would begin with."""
    if type(optimizer) not in (torch.optim.Adam, torch.optim.AdamW) or optimizer.state:
        return
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            optimizer.state[parameter] = {
                "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }


def _make_whole_resumable(undo: ExitStack) -> None:
    """Let optimizers that are not distributed save, and say, which tensors a checkpoint has.

    Megatron asks for those of SGD only where it asks for Adam's, in vain. And if each step so far was
    skipped, as fp16's first ones are, a checkpoint would be without a state, which no run resumes from.
    """
    from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params, FP32Optimizer

    def answering(sharded_state_dict: Callable[..., Any]) -> Callable[..., Any]:
        def sharded_state_dict_of_filled(
            self: Any, model_state: Any, is_loading: bool = False, *args: Any, **kwargs: Any
        ) -> Any:
            if self.init_state_fn is None:
                self.init_state_fn = lambda optimizer, config: fill_momentum(optimizer)
            if not is_loading:
                begin(self.optimizer)
            return sharded_state_dict(self, model_state, is_loading, *args, **kwargs)

        return sharded_state_dict_of_filled

    for kind in (FP32Optimizer, Float16OptimizerWithFloat16Params):
        _replace(undo, kind, "sharded_state_dict", answering(kind.sharded_state_dict))


def fill_momentum(optimizer: torch.optim.Optimizer) -> None:
    """Give each parameter of torch's SGD the momentum that it has after a step, as zeros."""
    for group in optimizer.param_groups:
        for parameter in group["params"] if group.get("momentum") else ():
            if not optimizer.state[parameter]:
                optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)


def adopt(state: dict[str, Any], optimizer: torch.optim.Optimizer, *, step_in_groups: bool) -> None:
    """Make the state of another Adam, in place, one that an optimizer can go on from.

    The step is under torch's Adam one of each parameter, which Megatron keeps as one `common_step`, and
    under that of Transformer Engine and of Apex one of each group of parameters. Settings that only one kind
    has are the optimizer's own.

    Args:
        state: the state as Megatron's checkpoints hold it.
        optimizer: what it is for.
        step_in_groups: where the step is looked for.
    """
    groups = state["param_groups"]
    steps = [state.get("state", {}).pop("common_step", None), *(g.get("step") for g in groups)]
    step = next((found for found in steps if found is not None), None)
    if step is None and step_in_groups:
        return
    if not step_in_groups:
        step = 0 if step is None else step  # a step of 0 Megatron leaves out
        state["state"]["common_step"] = torch.as_tensor(step, dtype=torch.float32)
    settings = {k: v for k, v in optimizer.param_groups[0].items() if k not in ("params", "step")}
    for group in groups:
        group |= {name: value for name, value in settings.items() if name not in group}
        group.pop("step", None)
        if step_in_groups:
            assert step is not None
            group["step"] = int(step)


def _share_checkpoints(undo: ExitStack) -> None:
    """Let one kind of Adam go on from a checkpoint of another: torch's from Transformer Engine's and back."""
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
    from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params, FP32Optimizer

    def adopting(load: Callable[..., None], *, distributed: bool) -> Callable[..., None]:
        def load_state_dict(self: Any, state_dict: dict[str, Any]) -> None:
            if self.optimizer is not None:
                ours = isinstance(self.optimizer, torch.optim.Adam | torch.optim.AdamW)
                state = state_dict.get("optimizer", state_dict)
                # The distributed optimizer hands the groups' step to torch's Adam itself.
                adopt(state, self.optimizer, step_in_groups=distributed or not ours)
                _fused.discard(self.optimizer)
            load(self, state_dict)

        return load_state_dict

    kinds = (FP32Optimizer, False), (Float16OptimizerWithFloat16Params, False)
    for kind, distributed in (*kinds, (DistributedOptimizer, True)):
        changed = adopting(kind.load_state_dict, distributed=distributed)
        _replace(undo, kind, "load_state_dict", changed)


def _replace(undo: ExitStack, module: Any, name: str, value: Any) -> None:
    """Set a module's attribute and note how to take that back."""
    if hasattr(module, name):
        undo.callback(setattr, module, name, getattr(module, name))
    else:
        undo.callback(delattr, module, name)
    setattr(module, name, value)


def _fuse_before_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    # Once, and after each load: it walks through all parameters between the norm and the step.
    if optimizer not in _fused:
        use_fused_adam(optimizer)
        _fused.add(optimizer)
