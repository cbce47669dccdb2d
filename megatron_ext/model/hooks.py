"""What is due before a module's weight is read without calling the module."""

import torch

from megatron_ext.exceptions import ConfigError


def run_forward_pre_hooks(module: torch.nn.Module, *inputs: torch.Tensor) -> None:
    """Run a module's forward pre-hooks.

    With ``--overlap-param-gather`` DDP finishes the all-gather of a module's parameters in such a hook;
    reading ``module.weight`` without it would use the weights of the step before.

    Args:
        module: the module whose weight is about to be read.
        inputs: what it would be called with.

    Raises:
        ConfigError: a hook changes the inputs, which only a call of the module would see.
    """
    for hook_id, hook in module._forward_pre_hooks.items():
        if hook_id in module._forward_pre_hooks_with_kwargs:
            changed = hook(module, inputs, {})
        else:
            changed = hook(module, inputs)
        if changed is not None:
            raise ConfigError(
                f"{type(module).__name__}: expected forward pre-hooks that leave the inputs alone, found "
                f"{hook!r}; the layer's weight is read directly"
            )
