"""Exchange of Llama and its like with Hugging Face folders: what both directions share.

On import, what the model brought besides its weights (config, tokenizer, chat template, generation
settings) is kept in the folder `own_tokenizer.KEPT` of the checkpoint; training takes its tokenizer from
there, and export puts it beside the new weights.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedConfig

from megatron_ext.checkpoint.own_tokenizer import CONFIG
from megatron_ext.conversion.families import FAMILIES
from megatron_ext.conversion.llama import LlamaLike
from megatron_ext.conversion.weights import parts, zero_shapes
from megatron_ext.data.tokenizers import ORIGIN_FILE
from megatron_ext.exceptions import CheckpointError

GENERATION = "generation_config.json"
TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json"),
    *("added_tokens.json", "vocab.json", "merges.txt", "vocab.txt", ORIGIN_FILE),
    *("chat_template.jinja", "chat_template.json", "chat_templates", "additional_chat_templates"),
)


@dataclass(frozen=True)
class Converted:
    """What was written.

    Attributes:
        path: the folder.
        parameters: of the model, padding and tied copies left out.
        dtype: of the weights.
        flags: architecture flags for training, one string a flag; empty after an export.
    """

    path: Path
    parameters: int
    dtype: torch.dtype
    flags: tuple[str, ...] = ()


def read_config(folder: Path) -> PreTrainedConfig:
    """Read `config.json` of a model, in the form that `transformers` gives to old and new ones.

    Raises:
        CheckpointError: there is none, it is of none of the `FAMILIES`, or `transformers` refuses it.
    """
    path = folder / CONFIG
    if not path.is_file():
        raise CheckpointError(f"expected a Hugging Face model, found no {path}")
    try:
        found = json.loads(path.read_text()).get("model_type")
        if found not in FAMILIES:
            raise CheckpointError(
                f"{path}: model_type: expected one of {', '.join(FAMILIES)}, found {found}"
            )
        return FAMILIES[found].config.from_pretrained(folder, local_files_only=True)
    except CheckpointError:
        raise
    except Exception as error:  # whatever transformers raises, the user needs the file's name
        raise CheckpointError(f"{path} cannot be read: {error}") from error


def copy_files(source: Path, target: Path, names: tuple[str, ...]) -> None:
    """Copy those of the files, or folders, that there are."""
    for name in names:
        if (source / name).is_dir():
            shutil.copytree(source / name, target / name)
        elif (source / name).is_file():
            shutil.copyfile(source / name, target / name)


def huggingface_shapes(model: LlamaLike) -> dict[str, tuple[int, ...]]:
    """Shape of every Hugging Face tensor of a model, in the order of `parts`."""
    shapes = {
        name: shape for p in parts(model) for name, shape in zip(p.names, p.shapes, strict=True)
    }
    return shapes | zero_shapes(model)


def parameters(model: LlamaLike) -> int:
    """Parameters of a model; padding and tied copies do not count."""
    return sum(torch.Size(shape).numel() for shape in huggingface_shapes(model).values())
