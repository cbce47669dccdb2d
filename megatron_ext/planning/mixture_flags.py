"""The flags of pretrain_unlearn.py that describe mixtures of experts, read without Megatron."""

from __future__ import annotations

import argparse
import ast
from argparse import Namespace
from collections.abc import Callable

from megatron_ext.exceptions import ConfigError
from megatron_ext.planning.mixture import Mixture
from megatron_ext.values import check_experts

SIZES = (
    *("num-experts", "moe-ffn-hidden-size", "moe-shared-expert-intermediate-size"),
    "expert-tensor-parallel-size",
)
DEFAULT_SIZES = {"moe-router-topk": 2, "expert-model-parallel-size": 1}  # Megatron's
SWITCHES = ("moe-shared-expert-gate", "moe-grouped-gemm", "moe-apply-probs-on-input")
# Flags that change the numbers in ways that this plan does not know.
NOT_PLANNED = (
    *("moe-expert-capacity-factor", "moe-pad-expert-input-to-capacity", "moe-latent-size"),
    *("moe-layer-recompute", "moe-single-grouped-weight", "moe-expert-rank-capacity-factor"),
    "expert-tensor-parallel-num-weight-shards",
)


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add those that are neither sizes nor switches."""
    for name, default in DEFAULT_SIZES.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--moe-layer-freq", default="1")
    parser.add_argument("--moe-token-dispatcher-type", default="allgather")


def mixture(flags: Namespace) -> Mixture | None:
    """The mixtures of experts of these flags, None for a dense model.

    Raises:
        ConfigError: see `check_experts`; or a pattern of layers that cannot be read or has another length,
            or another dispatcher.
    """
    check_experts(flags)
    if flags.num_experts is None:
        return None
    dispatcher = flags.moe_token_dispatcher_type
    if dispatcher not in ("allgather", "alltoall"):
        raise ConfigError(
            "--moe-token-dispatcher-type: expected allgather or alltoall, which the plan supports, found "
            f"{dispatcher}"
        )
    return Mixture(
        layers=_layers(flags.moe_layer_freq, flags.num_layers),
        experts=flags.num_experts,
        topk=flags.moe_router_topk,
        ffn=flags.moe_ffn_hidden_size or flags.ffn_hidden_size,
        shared=flags.moe_shared_expert_intermediate_size or 0,
        gate=flags.moe_shared_expert_gate,
        grouped=flags.moe_grouped_gemm,
        dispatcher=dispatcher,
    )


def _layers(text: str, count: int) -> tuple[bool, ...]:
    """Which layers are mixtures: each N-th from the first, or by a list such as `[0]*1+[1]*23`."""
    expected = (
        f"--moe-layer-freq: expected a number above 0, or 0 or 1 for each of {count} layers, found"
    )
    try:
        found = _value(ast.parse(text.strip(), mode="eval").body)
    except (SyntaxError, ValueError) as error:
        raise ConfigError(f"{expected} {text}") from error
    if isinstance(found, int):
        if found < 1:
            raise ConfigError(f"{expected} {text}")
        return tuple(layer % found == 0 for layer in range(count))
    if len(found) != count or not {*found} <= {0, 1}:
        raise ConfigError(f"{expected} {text}, of {len(found)}")
    return tuple(map(bool, found))


_OPERATIONS: dict[type, Callable[[object, object], object]] = {
    ast.Add: lambda a, b: a + b,  # type: ignore[operator]
    ast.Mult: lambda a, b: a * b,  # type: ignore[operator]
}


def _value(node: ast.expr) -> int | list[int]:
    """A number or a list of numbers, of sums and products of these; ValueError for all else."""
    if isinstance(node, ast.Constant) and type(node.value) is int:
        return node.value
    if isinstance(node, ast.List):
        numbers = [_value(item) for item in node.elts]
        if all(isinstance(number, int) for number in numbers):
            return numbers  # type: ignore[return-value]
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATIONS:
        try:
            found = _OPERATIONS[type(node.op)](_value(node.left), _value(node.right))
        except TypeError as error:
            raise ValueError from error
        if isinstance(found, int | list):
            return found
    raise ValueError
