"""The extra states of layers, of which not every checkpoint has all.

Transformer Engine's layers, its norms among them, each ask a checkpoint for an `_extra_state`: what fp8 has
learnt of their scales, and nothing without fp8. Which layers have one differs between layer specs and between
versions of Transformer Engine, and Megatron-Core ends at the first that a checkpoint lacks. A run here does
without those that are missing, and writes those that stock Megatron with Transformer Engine would miss.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron.core.dist_checkpointing.dict_utils import dict_list_map_inplace
from megatron.core.dist_checkpointing.mapping import (
    LocalNonpersistentObject,
    ShardedObject,
    ShardedTensor,
)

_SUFFIX = "._extra_state"
# The scale of a norm that is a layer of its own under every spec: the final one, of queries, of keys.
_NORM = "_layernorm.weight"


def keep_own(sharded_state: dict[str, Any], present: Mapping[str, Any]) -> None:
    """Leave to a model, in place, the extra states that a checkpoint lacks; every weight is still asked for.

    Args:
        sharded_state: what will be loaded, as `dist_checkpointing.load` takes it.
        present: what the checkpoint holds, by key, as `load_sharded_metadata` reads it.
    """

    def own(value: Any) -> Any:
        if _is_extra(value) and value.unique_key not in present:
            return LocalNonpersistentObject(value.data)
        return value

    dict_list_map_inplace(own, sharded_state)


def add_empty(
    sharded_state: dict[str, Any], *, present: Mapping[str, Any] | None = None
) -> list[tuple[str, str]]:
    """Add, in place, an empty extra state for every norm that has none.

    Args:
        sharded_state: what will be saved or loaded; the models in it are dictionaries by the names of their
            parameters.
        present: of a load, what the checkpoint holds, by key; others are not asked for.

    Returns:
        What was added: the model's key and the name in it.
    """
    added = []
    for key, part in sharded_state.items():
        if not isinstance(part, dict):
            continue
        for name, value in list(part.items()):
            if not isinstance(value, ShardedTensor) or not value.key.endswith(_NORM):
                continue
            layers = value.prepend_axis_num
            empty = ShardedObject(
                f"{value.key.removesuffix('.weight')}{_SUFFIX}",
                None,
                value.global_shape[:layers] or (1,),
                value.global_offset[:layers] or (0,),
                replica_id=value.replica_id,
            )
            own = f"{name.removesuffix('.weight')}{_SUFFIX}"
            if own not in part and (present is None or empty.unique_key in present):
                part[own] = empty
                added.append((key, own))
    return added


def _is_extra(value: Any) -> bool:
    return isinstance(value, ShardedObject) and value.key.endswith(_SUFFIX)
