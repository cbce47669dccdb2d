"""Rotary position embedding, as a Hugging Face config and as Megatron's flags.

What only one side can say ends in a `CheckpointError` that names the field.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_ext.conversion.fields import refuse

# Megatron's llama3 rotary scaling has these built in; only the factor is a flag.
LLAMA3_ROPE = {
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def unrotated_of_config(config: Any) -> tuple[bool, ...]:
    """Of each layer whether it has no rotation, which is 0 in SmolLM3's list; nothing if all have it."""
    rotated = config.no_rope_layers[: config.num_hidden_layers]
    if len(rotated) < config.num_hidden_layers:
        refuse("no_rope_layers", f"one for each of {config.num_hidden_layers} layers", len(rotated))
    return () if all(rotated) else tuple(not rotates for rotates in rotated)


def rope_freq_flag(unrotated: tuple[bool, ...]) -> int | str:
    """Megatron's flag for these layers: the number, where one says it."""
    every, layers = unrotated.index(True) + 1, len(unrotated)
    if layers % every == 0 and unrotated == tuple((i + 1) % every == 0 for i in range(layers)):
        return every
    return f"[{','.join(str(int(skip)) for skip in unrotated)}]"


def rotary_base_of(rope: Mapping[str, Any]) -> int:
    """Megatron's `--rotary-base` of a config's `rope_parameters`."""
    theta = rope["rope_theta"]
    if theta != int(theta):
        refuse("rope_theta", "a whole number, as --rotary-base is", theta)
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        refuse("partial_rotary_factor", 1.0, rope["partial_rotary_factor"])
    return int(theta)


def scaling_factor_of(rope: Mapping[str, Any]) -> float | None:
    """Megatron's `--rope-scaling-factor` of a config's `rope_parameters`; `None` without scaling."""
    kind = rope.get("rope_type", "default")
    if kind == "default":
        return None
    if kind != "llama3":
        refuse("rope_parameters.rope_type", "default or llama3", kind)
    for field, expected in LLAMA3_ROPE.items():
        if rope[field] != expected:
            refuse(f"rope_parameters.{field}", f"{expected}, as Megatron has built in", rope[field])
    return float(rope["factor"])
