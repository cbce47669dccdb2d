#!/usr/bin/env python
"""Exchange Llama, Mistral, Qwen and Mixtral models with Hugging Face folders.

    python tools/convert_checkpoint.py import --source Llama-3.2-1B --output ckpt/base
    torchrun ... pretrain_unlearn.py $(cat ckpt/base/ARGS.txt) --pretrained-checkpoint ckpt/base ...
    python tools/convert_checkpoint.py export --checkpoint ckpt/unlearn --output Llama-3.2-1B-unlearned

One process on the CPU; training loads the result at any parallel layout, and export reads any. The
tokenizer and its chat template are kept with the model. A SentencePiece model of `train_tokenizer.py` is
exported as a Hugging Face tokenizer with the same ids. A model that is not supported is refused, naming the
field of its config.
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from megatron_ext.exceptions import ConfigError
from tools.common import ToolParser, run_tool


def parse_args() -> argparse.Namespace:
    """Parse the command line.

    Raises:
        ConfigError: a size of which no file can be.
    """
    parser = ToolParser(description=__doc__)
    verbs = parser.add_subparsers(dest="verb", required=True)
    to_megatron = verbs.add_parser("import", help="Hugging Face folder to Megatron checkpoint")
    to_megatron.add_argument(
        "--source", type=Path, required=True, help="folder of the Hugging Face model"
    )
    to_huggingface = verbs.add_parser("export", help="Megatron checkpoint to Hugging Face folder")
    to_huggingface.add_argument(
        "--checkpoint",
        type=Path,
        required=True,
        help="checkpoint directory, as --load names it, or an iteration of it (DIR/iter_NNNNNNN)",
    )
    to_huggingface.add_argument(
        "--iteration", type=int, help="iteration to export; default: the latest"
    )
    to_huggingface.add_argument(
        "--tokenizer",
        type=Path,
        help="folder of the tokenizer, or a SentencePiece model; default: the one that the import kept, "
        "or the model that the run was given",
    )
    to_huggingface.add_argument(
        "--max-shard-size",
        type=float,
        default=5.0,
        metavar="GB",
        help="largest size of a safetensors file",
    )
    for verb in (to_megatron, to_huggingface):
        verb.add_argument("--output", type=Path, required=True, help="folder to write")
        verb.add_argument(
            "--dtype",
            choices=["float32", "bfloat16"],
            help="type of the weights; default: as stored",
        )
        verb.add_argument("--overwrite", action="store_true", help="replace an existing output")
    options = parser.parse_args()
    if options.verb == "export" and not 1e-9 <= options.max_shard_size < math.inf:
        raise ConfigError(
            f"--max-shard-size: expected a number above 0, found {options.max_shard_size:g}"
        )
    return options


def main() -> None:
    """Run a verb and say what it wrote."""
    options = parse_args()
    from megatron_ext.runtime import collector

    with collector.paused():
        from megatron_ext.runtime import compat, cpu

        compat.check_megatron_version()
        cpu.enable()
        import torch

        from megatron_ext.conversion.from_huggingface import ARGS_FILE, import_model
        from megatron_ext.conversion.to_huggingface import export_model

    dtype = getattr(torch, options.dtype) if options.dtype else None
    if options.verb == "import":
        result = import_model(
            options.source, options.output, dtype=dtype, overwrite=options.overwrite
        )
        print("\n".join(result.flags))
        note = f"; the flags above are in {options.output / ARGS_FILE}"
    else:
        result = export_model(
            options.checkpoint,
            options.output,
            iteration=options.iteration,
            tokenizer=options.tokenizer,
            dtype=dtype,
            max_shard_bytes=int(options.max_shard_size * 1e9),
            overwrite=options.overwrite,
        )
        note = ""
    kind = str(result.dtype).removeprefix("torch.")
    print(f"{result.path}: {result.parameters:,} parameters in {kind}{note}")


if __name__ == "__main__":
    run_tool(main)
