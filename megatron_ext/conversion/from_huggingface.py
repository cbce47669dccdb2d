"""From a Hugging Face folder to a Megatron checkpoint.

One tensor at a time is made from mapped files, and torch's writer keeps the last one of each key: the
peak is one layer and the embeddings, whatever the number of layers.
"""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

import torch
from megatron.training.arguments import parse_args
from torch import Tensor

from megatron_ext.arguments import add_arguments
from megatron_ext.checkpoint import torch_dist
from megatron_ext.checkpoint.folder import new_folder
from megatron_ext.checkpoint.inspect import TRACKER
from megatron_ext.checkpoint.own_tokenizer import CONFIG, KEPT, TOKENIZER_TYPE, tokenizer_spec
from megatron_ext.conversion.huggingface import (
    GENERATION,
    TOKENIZER_FILES,
    Converted,
    copy_files,
    huggingface_shapes,
    parameters,
    read_config,
)
from megatron_ext.conversion.llama import LlamaLike
from megatron_ext.conversion.safetensors import DTYPES, SafetensorsReader
from megatron_ext.conversion.weights import Part, join, megatron_shape, parts, zero_shapes
from megatron_ext.data.atomic import check_place
from megatron_ext.data.tokenizers import HuggingFaceReference, tokenizer_digest
from megatron_ext.exceptions import CheckpointError, ConfigError
from megatron_ext.runtime import compat

ARGS_FILE = "ARGS.txt"
# Rows of the vocabulary are padded to a multiple of this, Megatron's own default.
VOCABULARY_MULTIPLE = 128
# Layers ask a checkpoint for these beside their weights; they hold nothing without fp8.
_FINAL_EXTRA_STATE = "decoder.final_layernorm._extra_state"
_ATTENTION = "self_attention."
_EXTRA_STATES = tuple(
    f"{_ATTENTION}{name}" for name in ("linear_qkv", "linear_proj", "core_attention")
)
_MLP_EXTRA_STATES = ("mlp.linear_fc1", "mlp.linear_fc2")
_MIXTURE_EXTRA_STATES = ("pre_mlp_layernorm",)
_EXPERTS_EXTRA_STATES = ("mlp.experts.experts.linear_fc1", "mlp.experts.experts.linear_fc2")
_NORMS_EXTRA_STATES = (f"{_ATTENTION}q_layernorm", f"{_ATTENTION}k_layernorm")
# Sequences longer than this are unlearned by few; the flag can be given again behind the file's.
_SEQUENCE = 4096


def import_model(
    source: Path, output: Path, *, dtype: torch.dtype | None = None, overwrite: bool = False
) -> Converted:
    """Make a Megatron checkpoint of a Hugging Face folder.

    Args:
        source: folder with `config.json`, safetensors and a tokenizer.
        output: checkpoint directory, as `--pretrained-checkpoint` names it.
        dtype: of the new weights; by default that of the old ones.
        overwrite: whether a checkpoint that is there may be replaced.

    Raises:
        CheckpointError: there is no model, or it does not fit; names the field, or the tensor.
        ConfigError: the tokenizer cannot be loaded, or the output exists, has no place, or white space in
            its path.
    """
    check_place(output, flag="--output")
    kept_path = _check_path(output.resolve()) / KEPT
    _check_source(source)
    config = read_config(source)
    try:
        model = LlamaLike.from_config(config)
    except CheckpointError as error:
        raise CheckpointError(f"{source / CONFIG}: {error}") from error
    tokenizer = HuggingFaceReference(tokenizer_spec(source), flag="--source")
    if tokenizer.vocab_size > model.vocab_size:
        raise CheckpointError(
            f"{source / CONFIG}: vocab_size: expected at least the {tokenizer.vocab_size} tokens of the "
            f"tokenizer, found {model.vocab_size}"
        )
    rows = _padded(model.vocab_size)
    with SafetensorsReader(source) as reader:
        stored = _check_tensors(reader, model, dtype)
        dtype = dtype or stored
        with new_folder(output, mark=TRACKER, overwrite=overwrite) as folder:
            kept = folder / KEPT
            kept.mkdir()
            copy_files(source, kept, (CONFIG, GENERATION, *TOKENIZER_FILES))
            flags = _flags(model, dtype, tokenizer.vocab_size, kept_path)
            args = _arguments(flags)
            args.unpadded_vocab_size, args.padded_vocab_size = tokenizer.vocab_size, rows
            args.tokenizer_digest, args.params_dtype = tokenizer_digest(tokenizer_spec(kept)), dtype
            torch_dist.write(
                # Iteration 0 and not a release: an unlearning run records its reference by iteration.
                folder / "iter_0000000",
                [_lazy(part, reader, model, rows) for part in parts(model)],
                dtype=dtype,
                args=args,
                empty_objects=_extra_states(model),
            )
            # Without quotes: $(cat ARGS.txt) would take them for a part of the path.
            lines = tuple(" ".join(flag) for flag in flags)
            (folder / ARGS_FILE).write_text("".join(line + "\n" for line in lines))
            (folder / TRACKER).write_text("0")
    return Converted(output, parameters(model), dtype, lines)


def _check_source(source: Path) -> None:
    """Refuse what is no folder of a model, and say what is needed in place of a name on the hub."""
    if not (source / CONFIG).is_file():
        found = f"no {CONFIG} in it" if source.is_dir() else "no folder"
        raise CheckpointError(
            f"--source {source}: expected the folder of a Hugging Face model, such as `hf download NAME "
            f"--local-dir FOLDER` makes of a name on the hub, found {found}"
        )


def _check_path(output: Path) -> Path:
    """The path, if the flags of a run can name it."""
    if any(map(str.isspace, str(output))):
        raise ConfigError(
            f"--output: expected a path without white space, at which $(cat {ARGS_FILE}) splits the flags, "
            f"found {str(output)!r}"
        )
    return output


def _extra_states(model: LlamaLike) -> list[tuple[str, tuple[int, ...]]]:
    """Keys of the extra states of a model, each with the sizes of the axes it is stacked on."""
    layers = (*_EXTRA_STATES, *(_NORMS_EXTRA_STATES if model.family.qk_norm else ()))
    layers += _MLP_EXTRA_STATES if model.experts is None else _MIXTURE_EXTRA_STATES
    stacks: dict[str, tuple[int, ...]] = dict.fromkeys(layers, (model.num_layers,))
    if model.experts is not None:
        each = (model.num_layers, model.experts.number)
        stacks |= dict.fromkeys(_EXPERTS_EXTRA_STATES, each)
    states = ((f"decoder.layers.{layer}._extra_state", stack) for layer, stack in stacks.items())
    return [(_FINAL_EXTRA_STATE, (1,)), *states]


def _padded(vocab_size: int) -> int:
    return -(-vocab_size // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE


def _check_tensors(
    reader: SafetensorsReader, model: LlamaLike, dtype: torch.dtype | None
) -> torch.dtype:
    """Every tensor of the config is there with its shape, no other, and all of one dtype."""
    wanted, found, config = huggingface_shapes(model), reader.names(), reader.folder / CONFIG
    # Old files hold the rotary angles, which follow from the config.
    extra = {name for name in found - wanted.keys() if not name.endswith("rotary_emb.inv_freq")}
    if model.tied and "lm_head.weight" in extra:
        extra.remove("lm_head.weight")
        if not torch.equal(reader.read("lm_head.weight"), reader.read("model.embed_tokens.weight")):
            raise CheckpointError(
                f"{config}: tie_word_embeddings: expected lm_head.weight to be model.embed_tokens.weight, "
                "found another"
            )
    for label, names in (("lacks", wanted.keys() - found), ("has, beyond its config,", extra)):
        if names:
            raise CheckpointError(
                f"{reader.folder} {label} {len(names)} tensors, {min(names)} among them"
            )
    dtypes = set()
    for name, shape in wanted.items():
        actual, stored = reader.describe(name)
        dtypes.add(stored)
        if actual != shape:
            raise CheckpointError(
                f"{reader.folder}: expected {name} of shape {shape}, as {CONFIG} has it, found {actual}"
            )
    for name in zero_shapes(model):
        if reader.read(name).any():
            raise CheckpointError(
                f"{config}: attention_bias: expected {name} to be zero, as --add-qkv-bias has none, found "
                "others"
            )
    allowed = {"F32", "BF16"} if dtype is None else set(DTYPES)
    if not dtypes <= allowed or (dtype is None and len(dtypes) > 1):
        raise CheckpointError(
            f"{reader.folder}: dtype: expected F32 or BF16 throughout, found {', '.join(sorted(dtypes))}; "
            "choose with --dtype"
        )
    return DTYPES[min(dtypes)]


def _flags(model: LlamaLike, dtype: torch.dtype, tokens: int, tokenizer: Path) -> list[list[str]]:
    """Megatron's flags for training the model, each with its value."""
    flags = [
        *model.to_flags(),
        ["--attention-dropout", "0.0"],
        ["--hidden-dropout", "0.0"],
        ["--seq-length", str(min(model.max_position_embeddings, _SEQUENCE))],
        ["--tokenizer-type", TOKENIZER_TYPE],
        ["--tokenizer-model", str(tokenizer)],
    ]
    if _padded(tokens) < model.vocab_size:
        # Megatron pads the tokenizer's vocabulary; rows beyond that would be lost in training.
        flags.append(["--padded-vocab-size", str(_padded(model.vocab_size))])
    if dtype == torch.bfloat16:
        flags.append(["--bf16"])
    return flags


def _arguments(flags: list[list[str]]) -> Namespace:
    """What Megatron makes of the flags: what a run with them would save."""
    with compat.command_line(word for flag in flags for word in flag):
        args: Namespace = parse_args(add_arguments)
    args.consumed_train_samples = args.consumed_valid_samples = args.skipped_train_samples = 0
    args.no_save_optim = args.no_save_rng = True  # it holds neither, so no run is resumed from it
    return args


def _lazy(
    part: Part, reader: SafetensorsReader, model: LlamaLike, rows: int
) -> torch_dist.LazyTensor:
    def make() -> Tensor:
        tensors = [reader.read(name) for name in part.names]
        return join(part, tensors, groups=model.num_query_groups, rows=rows)

    return torch_dist.LazyTensor(part.key, part.place, megatron_shape(part, rows=rows), make)
