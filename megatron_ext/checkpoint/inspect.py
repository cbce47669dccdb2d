"""What a checkpoint directory holds, read before any process group exists.

Megatron's ``load_checkpoint`` tolerates what a run must not: a missing directory falls back to
``--pretrained-checkpoint`` and a missing tracker file keeps random weights. Everything here raises.
"""

from __future__ import annotations

from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CONFIG_FNAME
from torch.distributed.checkpoint import CheckpointException

from megatron_ext.checkpoint import safe_load
from megatron_ext.checkpoint.complete import defect, held
from megatron_ext.exceptions import CheckpointError, ConfigError
from megatron_ext.refusals import OF_THE_MODEL, refuse

TRACKER = "latest_checkpointed_iteration.txt"

# Arguments that change what the weights mean without changing their shapes, or whose shapes give a
# less helpful message.
ARCHITECTURE = (
    "num_layers",
    "hidden_size",
    "ffn_hidden_size",
    "num_attention_heads",
    "kv_channels",
    "swiglu",
    "normalization",
    "layernorm_epsilon",
    "layernorm_zero_centered_gamma",
    "apply_residual_connection_post_layernorm",
    "qk_layernorm",
    "qk_l2_norm",
    "softmax_type",
    "window_size",
    "window_attn_skip_freq",
    "squared_relu",
    "openai_gelu",
    "quick_geglu",
    "glu_linear_offset",
    "activation_func_clamp_value",
    "position_embedding_type",
    "no_rope_freq",
    "rotary_base",
    "rotary_percent",
    "rotary_interleaved",
    "rotary_seq_len_interpolation_factor",
    "use_rope_scaling",
    "rope_scaling_factor",
    "rotary_scaling_factor",
    "mscale",
    "mscale_all_dim",
    "yarn_original_max_position_embeddings",
    "yarn_beta_fast",
    "yarn_beta_slow",
    "yarn_correction_range_round_to_int",
    "untie_embeddings_and_output_weights",
    "add_bias_linear",
    "add_qkv_bias",
    "num_experts",
    "moe_layer_freq",
    "moe_ffn_hidden_size",
    "moe_shared_expert_intermediate_size",
    "moe_shared_expert_gate",
    "moe_router_topk",
    "moe_router_score_function",
    "moe_router_pre_softmax",
    "moe_router_num_groups",
    "moe_router_group_topk",
    "moe_router_topk_scaling_factor",
    "moe_router_enable_expert_bias",
    "moe_apply_probs_on_input",
    "moe_latent_size",
    "moe_mlp_glu_interleave_size",
    "moe_shared_expert_glu_interleave_size",
)
# Ways to balance experts that decide where a token goes; the others add to the loss at most.
ROUTING_RULES = ("sinkhorn", "quantile_balancing")
# Where the flag has another name than the argument.
_FLAGS = {
    "layernorm_epsilon": "norm-epsilon",
    "layernorm_zero_centered_gamma": "apply-layernorm-1p",
}
# Arguments that a flag switches off.
_OFF_FLAGS = {"add_bias_linear": "disable-bias-linear"}


@dataclass(frozen=True)
class Checkpoint:
    """One iteration of a checkpoint directory.

    Attributes:
        directory: what ``--load`` names.
        iteration: the iteration, 0 for a release.
        path: the folder that holds the tensors.
        args: the arguments of the run that wrote it.
        schedule: the state of its learning rate schedule, if it has one.
    """

    directory: Path
    iteration: int
    path: Path
    args: Namespace
    schedule: dict[str, Any] | None = None


def folder_name(iteration: int) -> str:
    """Megatron's name for the folder of an iteration."""
    return f"iter_{iteration:07d}"


def has_checkpoint(directory: str | Path | None) -> bool:
    """Whether a directory holds a finished checkpoint."""
    return directory is not None and (Path(directory) / TRACKER).is_file()


def tracked(directory: str | Path) -> str | None:
    """What the tracker file of a directory says, most often an iteration; ``None`` where there is none."""
    tracker = Path(directory) / TRACKER
    # A damaged one may hold any bytes.
    return tracker.read_text(errors="replace").strip() if tracker.is_file() else None


def open_checkpoint(
    directory: str | Path,
    *,
    flag: str,
    iteration: int | None = None,
    folder: str | None = None,
    iteration_flag: str = "--ckpt-step",
) -> Checkpoint:
    """Read which checkpoint a directory holds, without its tensors.

    Args:
        directory: what the flag names.
        flag: the flag, for messages.
        iteration: the iteration wanted; the latest by default.
        folder: the name of the folder wanted, ``release`` included, instead of an iteration.
        iteration_flag: the flag that named the iteration, for messages.

    Raises:
        CheckpointError: the directory, its tracker file or the iteration is missing or unreadable.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise CheckpointError(
            f"{flag}: expected a checkpoint directory, found nothing at {directory}"
        )
    if folder is None:
        latest = _latest(directory, flag)
        folder = latest if iteration is None else folder_name(iteration)
    number = 0 if folder == "release" else int(folder.removeprefix("iter_"))
    path = directory / folder
    if iteration is not None and not path.exists():
        raise CheckpointError(
            f"{iteration_flag} {iteration}: expected an iteration that {directory} ({flag}) holds, found "
            f"{held(directory)}"
        )
    if not (path / CONFIG_FNAME).exists():
        raise CheckpointError(
            f"{flag}: expected a torch_dist checkpoint at {path}, found none (or one of another format)"
        )
    if reason := defect(path):
        raise CheckpointError(f"{flag}: {path} cannot be read: {reason}")
    common = _load_common(path, flag)
    args = common.get("args") if isinstance(common, dict) else None
    if args is None:
        raise CheckpointError(f"{flag}: expected the arguments of its run in {path}, found none")
    schedule = common.get("opt_param_scheduler")
    return Checkpoint(
        directory=directory, iteration=number, path=path, args=args, schedule=schedule
    )


def _latest(directory: Path, flag: str) -> str:
    """The folder that the tracker file names."""
    tracker, text = directory / TRACKER, tracked(directory)
    if text is None:
        hint = (
            f"; name the folder above, {directory.parent}"
            if has_checkpoint(directory.parent)
            else ""
        )
        raise CheckpointError(f"{flag}: expected a finished checkpoint, found no {tracker}{hint}")
    if not text.isdecimal() and text != "release":
        raise CheckpointError(
            f"{tracker}: expected an iteration number or 'release', found {text!r}"
        )
    return "release" if text == "release" else folder_name(int(text))


def _load_common(path: Path, flag: str) -> Any:
    """All of a checkpoint but its tensors, without running what it may hold."""
    safe_load.enable()
    try:
        return dist_checkpointing.load_common_state_dict(str(path))
    # Whatever the storage raises, the user needs the folder's name. torch's is no Exception.
    except (Exception, CheckpointException) as error:
        raise CheckpointError(
            f"{flag}: {path} cannot be read: {safe_load.reason(error)}"
        ) from error


def check_architecture(checkpoint: Checkpoint, args: Namespace, *, flag: str) -> None:
    """Compare a checkpoint's model with the one that the run will build.

    Args:
        checkpoint: the checkpoint to be loaded.
        args: Megatron's validated arguments of this run.
        flag: the flag that named the checkpoint, for messages.

    Raises:
        CheckpointError: another architecture, one that is not computed here, another vocabulary or
            tokenizer, or a longer sequence.
    """
    saved = checkpoint.args
    try:
        refuse(saved, OF_THE_MODEL, where="is not supported")
    except ConfigError as error:
        raise CheckpointError(f"{flag}: {checkpoint.path} was trained with {error}") from error
    wanted, present = _architecture(args), _architecture(saved)
    for name, expected in wanted.items():
        found = present.get(name, expected)
        if expected != found:
            if name in _OFF_FLAGS:
                expected, found = not expected, not found
            raise CheckpointError(
                f"{flag}: expected --{flag_of(name)} {expected}, as this run has, found {found} in "
                f"{checkpoint.path}"
            )
    longest = getattr(saved, "max_position_embeddings", None)
    if longest is not None and args.seq_length > longest:
        raise CheckpointError(
            f"--seq-length: expected at most {longest}, the length that {checkpoint.path} was trained for, "
            f"found {args.seq_length}"
        )
    _check_vocabulary(checkpoint, args, flag)


def flag_of(name: str) -> str:
    """Megatron's flag for an argument, without its dashes."""
    return _FLAGS.get(name) or _OFF_FLAGS.get(name) or name.replace("_", "-")


def _architecture(args: Namespace) -> dict[str, object]:
    values = {name: getattr(args, name) for name in ARCHITECTURE if hasattr(args, name)}
    if hasattr(args, "num_attention_heads"):
        # Megatron fills num_query_groups in during a run; the flag alone says nothing without the switch.
        grouped = getattr(args, "group_query_attention", False)
        values["num_query_groups"] = args.num_query_groups if grouped else args.num_attention_heads
    if "no_rope_freq" in values:
        values["no_rope_freq"] = [*map(int, unrotated_layers(args))] or None
    if getattr(args, "num_experts", None) and hasattr(args, "moe_router_load_balancing_type"):
        values["moe_router_load_balancing_type"] = routing_rule(args)
    return values


def unrotated_layers(args: Namespace) -> tuple[bool, ...]:
    """Of each layer whether its queries and keys are not rotated; nothing if all are.

    ``--no-rope-freq`` is a list of 1 for no rotation, or N: every N-th layer has none.
    """
    found = getattr(args, "no_rope_freq", None) or []
    if isinstance(found, int):
        return tuple((layer + 1) % found == 0 for layer in range(args.num_layers))
    return tuple(map(bool, found)) if any(found) else ()


def routing_rule(args: Namespace) -> str:
    """How the experts of a token are chosen, in words for an error."""
    balancing = getattr(args, "moe_router_load_balancing_type", None) or ()  # one, or a list
    found = (rule for rule in ROUTING_RULES if rule in balancing)
    return next(found, f"another than {' or '.join(ROUTING_RULES)}")


def _check_vocabulary(checkpoint: Checkpoint, args: Namespace, flag: str) -> None:
    for name in ("unpadded_vocab_size", "tokenizer_digest"):
        expected, found = getattr(args, name, None), getattr(checkpoint.args, name, None)
        if expected is not None and found is not None and expected != found:
            raise CheckpointError(
                f"--tokenizer-model: expected the tokenizer of {checkpoint.path} ({flag}; {name} {found}), "
                f"found {name} {expected}"
            )
    # A checkpoint of stock Megatron records the padded size alone.
    padded = getattr(checkpoint.args, "padded_vocab_size", None)
    if padded is not None and args.unpadded_vocab_size > padded:
        raise CheckpointError(
            f"--tokenizer-model: expected at most the {padded} ids of {checkpoint.path} ({flag}), "
            f"found {args.unpadded_vocab_size}"
        )
