"""From a Megatron checkpoint, of any parallel layout, to a Hugging Face folder.

The peak is one safetensors file and one stored tensor.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedConfig

from megatron_ext.checkpoint import torch_dist
from megatron_ext.checkpoint.folder import new_folder
from megatron_ext.checkpoint.inspect import Checkpoint
from megatron_ext.checkpoint.named import open_named
from megatron_ext.checkpoint.own_tokenizer import CONFIG, KEPT, TOKENIZER_TYPE, tokenizer_spec
from megatron_ext.conversion.chat_files import ChatFiles
from megatron_ext.conversion.families import FAMILIES, Family
from megatron_ext.conversion.from_sentencepiece import write_tokenizer
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
from megatron_ext.conversion.safetensors import write_safetensors
from megatron_ext.conversion.weights import megatron_shape, parts, split, zero_shapes
from megatron_ext.data.atomic import check_place
from megatron_ext.data.tokenizers import (
    SENTENCEPIECE_TYPES,
    HuggingFaceReference,
    TokenizerSpec,
    tokenizer_digest,
)
from megatron_ext.exceptions import CheckpointError, ConfigError

logger = logging.getLogger(__name__)


def export_model(
    source: Path,
    output: Path,
    *,
    iteration: int | None = None,
    tokenizer: Path | None = None,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = 5 * 10**9,
    overwrite: bool = False,
) -> Converted:
    """Make a Hugging Face folder of a Megatron checkpoint.

    Args:
        source: checkpoint directory, or an iteration of it as `open_named` reads it.
        output: the folder.
        iteration: which one; by default the latest.
        tokenizer: folder of the tokenizer, or the SentencePiece model to make one of; by default what the
            import kept, or the SentencePiece model that the run was given.
        dtype: of the new weights; by default that of the old ones.
        max_shard_bytes: size of a safetensors file.
        overwrite: whether a model that is there may be replaced.

    Raises:
        CheckpointError: the checkpoint is unreadable or no such model; names the flag, or the tensor.
        ConfigError: the tokenizer is missing, another one, or does not fit the chat template; or the output
            exists or has no place.
    """
    check_place(output, flag="--output")
    checkpoint = open_named(source, flag="--checkpoint", iteration=iteration)
    with tempfile.TemporaryDirectory() as made:
        kept = _kept(checkpoint, tokenizer, made=Path(made))
        tokens = _check_tokenizer(kept, checkpoint, converted=kept == Path(made))
        return _export(
            checkpoint,
            output,
            kept=kept,
            tokens=tokens,
            dtype=dtype,
            max_shard_bytes=max_shard_bytes,
            overwrite=overwrite,
        )


def _export(
    checkpoint: Checkpoint,
    output: Path,
    *,
    kept: Path,
    tokens: int,
    dtype: torch.dtype | None,
    max_shard_bytes: int,
    overwrite: bool,
) -> Converted:
    """Write the model beside a tokenizer of so many tokens."""
    chat = ChatFiles.of_run(checkpoint.args, tokenizer=kept)
    template = _template(kept)
    reader = torch_dist.Reader(checkpoint.path)
    (rows, *_), stored = reader.describe("embedding.word_embeddings.weight")
    family = FAMILIES[template.model_type] if template else None
    model = LlamaLike.from_arguments(checkpoint.args, vocab_size=rows, family=family)
    if model.family is not family:
        template = None
    vocab_size = _vocab_size(template, tokens=tokens, rows=rows)
    model = dataclasses.replace(model, vocab_size=vocab_size)
    _check_tensors(reader, model, rows)
    dtype = dtype or stored
    with new_folder(output, mark=CONFIG, overwrite=overwrite) as folder:
        write_safetensors(
            folder,
            huggingface_shapes(model),
            _tensors(reader, model),
            dtype=dtype,
            max_shard_bytes=max_shard_bytes,
        )
        copy_files(kept, folder, (GENERATION, *TOKENIZER_FILES))
        _write_config(folder, model, kept=kept, template=template, dtype=dtype)
        if chat is not None:
            chat.write(folder)
    return Converted(output, parameters(model), dtype)


def _kept(checkpoint: Checkpoint, tokenizer: Path | None, *, made: Path) -> Path:
    """Where the tokenizer is: given, left by the import, where the run took it from, or made of its model."""
    args = checkpoint.args
    kind, model = (getattr(args, f"tokenizer_{name}", None) for name in ("type", "model"))
    places = [tokenizer] if tokenizer is not None else [checkpoint.directory / KEPT]
    if tokenizer is None and model:
        places.append(Path(model))
    for place in places:
        if place.is_dir() and (place != Path(model or "") or kind == TOKENIZER_TYPE):
            return place
        if place.is_file() and kind in SENTENCEPIECE_TYPES:
            _check_model(place, checkpoint)
            write_tokenizer(place, made)
            return made
    if tokenizer is not None and not tokenizer.exists():
        raise ConfigError(
            "--tokenizer: expected the folder of a Hugging Face tokenizer or a SentencePiece model, found "
            f"nothing at {tokenizer}"
        )
    if tokenizer is not None:
        return tokenizer  # and its own check says what is wrong
    moved = ""
    if model and not Path(model).exists():
        moved = f"; {checkpoint.path} records {model}: --tokenizer names it at its present place"
    raise ConfigError(
        f"--tokenizer: expected the folder of a Hugging Face tokenizer, found none given and none at "
        f"{' or '.join(map(str, places))}{moved}"
    )


def _check_model(model: Path, checkpoint: Checkpoint) -> None:
    """Refuse a SentencePiece model that is not the one of the run."""
    spec = TokenizerSpec(tokenizer_type=checkpoint.args.tokenizer_type, tokenizer_model=str(model))
    expected, found = getattr(checkpoint.args, "tokenizer_digest", None), tokenizer_digest(spec)
    if expected not in (None, found):
        raise ConfigError(
            f"--tokenizer: expected the SentencePiece model of {checkpoint.path} (digest {expected}), found "
            f"digest {found} of {model}"
        )


def _template(folder: Path) -> PreTrainedConfig | None:
    """The config beside the tokenizer, if it is of such a model; a tokenizer may come from any other."""
    if not (folder / CONFIG).is_file():
        return None
    try:
        config = read_config(folder)
        LlamaLike.from_config(config)
    except CheckpointError as error:
        logger.warning("%s of the tokenizer is passed over: %s", CONFIG, error)
        return None
    return config


def _check_tokenizer(folder: Path, checkpoint: Checkpoint, *, converted: bool) -> int:
    """Whether it is the tokenizer that the model was trained with, or its model; its number of tokens."""
    args = checkpoint.args
    tokens = HuggingFaceReference(tokenizer_spec(folder), flag="--tokenizer").vocab_size
    facts: list[tuple[str, object, object]] = [
        ("tokens", getattr(args, "unpadded_vocab_size", None), tokens)
    ]
    if getattr(args, "tokenizer_type", None) == TOKENIZER_TYPE:
        digest = tokenizer_digest(tokenizer_spec(folder))
        facts.append(("digest", getattr(args, "tokenizer_digest", None), digest))
    elif not converted:
        logger.warning(
            "--tokenizer: %s was trained with a %s; whether %s gives the same ids is not checked",
            *(checkpoint.path, getattr(args, "tokenizer_type", "tokenizer of its own"), folder),
        )
    for label, expected, found in facts:
        if expected is not None and expected != found:
            raise ConfigError(
                f"--tokenizer: expected the tokenizer of {checkpoint.path} ({label} {expected}), found "
                f"{label} {found} in {folder}"
            )
    return tokens


def _vocab_size(template: PreTrainedConfig | None, *, tokens: int, rows: int) -> int:
    """Rows of the embedding that are no padding."""
    if template is None or not tokens <= template.vocab_size <= rows:
        if template is not None:
            logger.warning(
                "vocab_size: %d where %s of the imported model says %d; the checkpoint has %d rows",
                *(tokens, CONFIG, template.vocab_size, rows),
            )
        return tokens
    vocab_size: int = template.vocab_size
    return vocab_size


def _check_tensors(reader: torch_dist.Reader, model: LlamaLike, rows: int) -> None:
    """Every tensor of the architecture is there with its shape, and no other."""
    wanted = {}
    for part in parts(model):
        stack = tuple(size for _, size in part.place)
        wanted[part.key] = (*stack, *megatron_shape(part, rows=rows))
    extra = reader.keys(torch_dist.MODEL_KEYS) - wanted.keys()
    if extra:
        raise CheckpointError(
            f"{reader.path} has, beyond its arguments, {len(extra)} tensors, {min(extra)} among them"
        )
    for key, expected in wanted.items():
        found, _ = reader.describe(key)
        if found != expected:
            raise CheckpointError(
                f"{reader.path}: expected {key} of shape {expected}, found {found}"
            )


def _tensors(reader: torch_dist.Reader, model: LlamaLike) -> Iterator[tuple[str, Tensor]]:
    """Hugging Face tensors by name, in the order of `huggingface_shapes`."""
    for part in parts(model):
        tensor = reader.read(part.key, *(index for index, _ in part.place))
        yield from zip(part.names, split(part, tensor, groups=model.num_query_groups), strict=True)
    for name, shape in zero_shapes(model).items():
        yield name, torch.zeros(shape)


def _write_config(
    folder: Path,
    model: LlamaLike,
    *,
    kept: Path,
    template: PreTrainedConfig | None,
    dtype: torch.dtype,
) -> None:
    """The imported model's config as it was where it still holds, else one that says what changed."""
    if (
        template is not None
        and template.dtype == dtype
        and LlamaLike.from_config(template) == model
    ):
        copy_files(kept, folder, (CONFIG,))
        return
    config = template or _config_of_tokenizer(kept, model.family)
    for field, value in model.to_config().items():
        setattr(config, field, value)
    config.dtype, config.architectures = dtype, [model.family.architecture]
    config.save_pretrained(folder)
    _add_old_keys(folder / CONFIG)
    if not (folder / GENERATION).is_file():
        GenerationConfig.from_model_config(config).save_pretrained(folder)


def _add_old_keys(path: Path) -> None:
    """Say again what `transformers` before 5 reads elsewhere, where it would take its defaults in silence."""
    fields = json.loads(path.read_text(encoding="utf-8"))
    rope = dict(fields["rope_parameters"])
    fields["rope_theta"] = rope.pop("rope_theta")
    if rope.get("rope_type", "default") != "default":
        fields["rope_scaling"] = rope
    fields["torch_dtype"] = fields["dtype"]
    path.write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _config_of_tokenizer(folder: Path, family: Family) -> PreTrainedConfig:
    """A config that knows the ids at which generation begins and ends."""
    tokenizer = HuggingFaceReference(tokenizer_spec(folder)).tokenizer
    return family.config(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
