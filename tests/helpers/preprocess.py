"""Preprocessing with a SentencePiece model, in this process and as a user starts it."""

import gzip
import json
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import zstandard

from megatron_ext.data.preprocess import PreprocessConfig, preprocess
from megatron_ext.data.tokenizers import TokenizerSpec

ROOT = Path(__file__).resolve().parents[2]
TOOL = ROOT / "tools" / "preprocess_data.py"


def run(model, inputs, prefix, **options):
    spec = TokenizerSpec(tokenizer_type="SentencePieceTokenizer", tokenizer_model=model)
    inputs = [str(path) for path in inputs]
    return preprocess(
        PreprocessConfig(inputs=inputs, output_prefix=str(prefix), tokenizer=spec, **options)
    )


def tool(model, inputs, prefix, *options, **popen):
    command = [sys.executable, TOOL, "--input", *inputs, "--output-prefix", prefix]
    command += ["--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", model, *options]
    return subprocess.Popen(
        [str(part) for part in command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **popen,
    )


def write_as(path, texts):
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(lines))
    elif path.suffix == ".zst":
        half = lines.index(b"\n", len(lines) // 2) - 3  # frames may end anywhere in a line
        compress = zstandard.ZstdCompressor().compress
        path.write_bytes(compress(lines[:half]) + compress(lines[half:]))
    elif path.suffix == ".parquet":
        table = pa.table({"id": list(range(len(texts))), "text": texts})
        pq.write_table(table, path, row_group_size=7)
    else:
        path.write_bytes(lines.rstrip(b"\n"))  # the last line may lack its end
    return path
