r"""Train a SentencePiece BPE tokenizer for Megatron's SentencePieceTokenizer.

    python tools/train_tokenizer.py --input 'corpus/*.jsonl' --vocab-size 32000 \
        --output tokenizer.model

Inputs are those of preprocess_data.py. Decoding gives back the text that was encoded, white space
and rare characters (as bytes) included, save for U+2581, SentencePiece's own mark for a space.
Pieces 0 to 3 are <unk>, <s>, </s> (which --append-eod puts after a document) and <pad>.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_ext.data.train_tokenizer import TrainTokenizerConfig, train_tokenizer
from tools.common import ToolParser, run_tool, whole_number


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parses the command line."""
    parser = ToolParser(description=__doc__, allow_abbrev=False)
    parser.add_argument(
        "--input", nargs="+", required=True, help="files, directories, quoted globs"
    )
    parser.add_argument("--json-keys", nargs="+", default=["text"])
    parser.add_argument(
        "--input-format", choices=["auto", "jsonl", "parquet", "text"], default="auto"
    )
    parser.add_argument(
        "--on-error",
        choices=["fail", "skip"],
        default="fail",
        help="at a bad record, stop and write nothing, or skip and count it",
    )
    parser.add_argument(
        "--vocab-size",
        type=int,
        required=True,
        help="number of pieces, control and byte pieces included",
    )
    parser.add_argument("--output", required=True, help="the model file to write")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing model")
    parser.add_argument(
        "--no-split-digits",
        dest="split_digits",
        action="store_false",
        help="let a piece hold several digits; by default each digit is a piece",
    )
    parser.add_argument(
        "--max-bytes",
        type=whole_number,
        default=1_000_000_000,
        help="bytes of text to learn from, taken from the start of each file in proportion to its size; "
        "training holds it in memory",
    )
    return parser.parse_args(argv)


def main() -> None:
    """Runs the tool."""
    args = parse_args()
    result = train_tokenizer(
        TrainTokenizerConfig(
            inputs=args.input,
            output=args.output,
            vocab_size=args.vocab_size,
            keys=args.json_keys,
            input_format=args.input_format,
            split_digits=args.split_digits,
            max_bytes=args.max_bytes,
            on_error=args.on_error,
            overwrite=args.overwrite,
        )
    )
    print(
        f"{args.output}: {result.vocab_size:,} pieces from "
        f"{result.text_bytes / 1e6:,.1f} MB of text"
    )
    cut = f", {result.files_cut:,} in part (--max-bytes)" if result.files_cut else ""
    print(f"{result.files_read:,} of {result.files:,} files read{cut}")
    print(
        f"{result.bytes_per_token:.2f} bytes a token on the last {result.probe_bytes / 1e6:.1f} MB"
    )
    for reason, count in sorted(result.skipped.items()):
        print(f"skipped {count:,}: {reason}")


if __name__ == "__main__":
    run_tool(main)
