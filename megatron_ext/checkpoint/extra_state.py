"""The extra states of layers, where a checkpoint does not have them all.

Transformer Engine's layers, its norms among them, each ask a checkpoint for an `_extra_state`: what fp8 has
learnt of their scales, and nothing without fp8. Which layers have one differs between layer specs and between
versions of Transformer Engine, and Megatron-Core ends at the first that a checkpoint lacks.
"""

from __future__ import annotations

from typing import Any

from megatron.core.dist_checkpointing.dict_utils import dict_list_map_inplace, nested_values
from megatron.core.dist_checkpointing.mapping import LocalNonpersistentObject, ShardedObject
from megatron.core.dist_checkpointing.serialization import load_sharded_metadata

_SUFFIX = "._extra_state"


def keep_own(sharded_state: dict[str, Any], path: str) -> None:
    """Leave to a model, in place, the extra states that a checkpoint lacks; every weight is still asked for.

    Args:
        sharded_state: what will be loaded, as `dist_checkpointing.load` takes it.
        path: the folder that holds the checkpoint's tensors.
    """
    wanted = [value for value in nested_values(sharded_state) if _is_extra(value)]
    if not wanted:
        return
    present = load_sharded_metadata(path)

    def own(value: Any) -> Any:
        if _is_extra(value) and value.unique_key not in present:
            return LocalNonpersistentObject(value.data)
        return value

    dict_list_map_inplace(own, sharded_state)


def _is_extra(value: Any) -> bool:
    return isinstance(value, ShardedObject) and value.key.endswith(_SUFFIX)


def apply() -> None:
    """Let Megatron's loop load so; called once before training."""
    from megatron.training import checkpointing

    load = checkpointing._load_global_dist_base_checkpoint

    def load_with_own(
        load_dir: str,
        args: Any,
        rank0: bool,
        sharded_state_dict: dict[str, Any] | None,
        iteration: int,
        release: bool,
        **more: Any,
    ) -> Any:
        if not rank0 and sharded_state_dict is not None:
            folder = checkpointing.get_checkpoint_name(
                load_dir, iteration, release, return_base_dir=True
            )
            keep_own(sharded_state_dict, folder)
        return load(load_dir, args, rank0, sharded_state_dict, iteration, release, **more)

    checkpointing._load_global_dist_base_checkpoint = load_with_own
