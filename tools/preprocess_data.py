r"""Turn text into Megatron's indexed data sets.

    python tools/preprocess_data.py --input corpus/*.jsonl --output-prefix data/corpus \
        --tokenizer-type SentencePieceTokenizer --tokenizer-model tokenizer.model \
        --append-eod --workers 8

writes data/corpus_text_document.bin and .idx, byte for byte what the tool of the same name in
Megatron-LM writes, and data/corpus_text_document.manifest.json, by which training refuses another
tokenizer. Give data/corpus_text_document to --data-path.

Inputs are JSON lines, Parquet or plain text, the first and the last also as .gz, .zst, .bz2 and .xz. Of a
directory, names that begin with _ or . are left out, and log lines say what else is. With --conversations
a record is one of the conversations that --chat-data-path of training reads; it is rendered by the chat
template and becomes a document with the very tokens that chat tuning trains on.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_ext.data.preprocess import PreprocessConfig, PreprocessResult, preprocess
from megatron_ext.data.tokenizers import TOKENIZER_TYPES, TokenizerSpec
from tools.common import ToolParser, run_tool, usable_cores


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parses the command line; names are Megatron-LM's where it has them."""
    parser = ToolParser(description=__doc__, allow_abbrev=False)
    group = parser.add_argument_group("input")
    group.add_argument(
        "--input", nargs="+", required=True, help="files, directories or quoted globs"
    )
    group.add_argument(
        "--json-keys", nargs="+", default=["text"], help="keys or columns that hold text"
    )
    group.add_argument(
        "--conversations",
        action="store_true",
        help="records are conversations; each is rendered by the chat template into one document",
    )
    group.add_argument(
        "--chat-template",
        metavar="FILE",
        help="Jinja file, or checkpoint directory of a chat run; default: the tokenizer's own, or else the "
        "built-in one, as in chat tuning",
    )
    group.add_argument(
        "--input-format", choices=["auto", "jsonl", "parquet", "text"], default="auto"
    )
    group.add_argument(
        "--text-unit",
        choices=["file", "line", "paragraph"],
        default="file",
        help="what one document of plain text is: a file, a non-blank line, or a paragraph",
    )
    group.add_argument(
        "--on-error",
        choices=["fail", "skip"],
        default="fail",
        help="at a bad record, stop and write nothing, or skip and count it",
    )
    group = parser.add_argument_group("tokenizer")
    group.add_argument("--tokenizer-type", required=True, choices=TOKENIZER_TYPES)
    group.add_argument(
        "--tokenizer-model", required=True, help="SentencePiece file; Hugging Face directory"
    )
    group.add_argument("--tokenizer-hf-no-use-fast", action="store_true")
    group.add_argument("--tokenizer-hf-no-include-special-tokens", action="store_true")
    group.add_argument("--trust-remote-code", action="store_true")
    group.add_argument(
        "--tokenizer-backend",
        choices=["auto", "gigatoken", "reference"],
        default="auto",
        help="auto uses gigatoken if its ids equal the reference tokenizer's on a sample, and keeps checking",
    )
    group.add_argument(
        "--append-eod",
        action="store_true",
        help="end each document with the EOS token; a conversation only if it does not end with it already",
    )
    group = parser.add_argument_group("output")
    group.add_argument(
        "--output-prefix", required=True, help="outputs are PREFIX_KEY_document.bin and .idx"
    )
    group.add_argument("--overwrite", action="store_true", help="replace existing outputs")
    group = parser.add_argument_group("run")
    group.add_argument(
        "--workers",
        type=int,
        default=usable_cores(),
        help="processes that tokenise; more than about 8 would wait for the one that reads",
    )
    group.add_argument(
        "--log-interval", type=int, default=10000, help="documents between progress lines"
    )
    return parser.parse_args(argv)


def build_config(args: argparse.Namespace) -> PreprocessConfig:
    """Maps flags to the library's configuration."""
    tokenizer = TokenizerSpec(
        tokenizer_type=args.tokenizer_type,
        tokenizer_model=args.tokenizer_model,
        include_special_tokens=not args.tokenizer_hf_no_include_special_tokens,
        use_fast=not args.tokenizer_hf_no_use_fast,
        trust_remote_code=args.trust_remote_code,
    )
    return PreprocessConfig(
        inputs=args.input,
        output_prefix=args.output_prefix,
        tokenizer=tokenizer,
        keys=args.json_keys,
        conversations=args.conversations,
        chat_template=args.chat_template,
        append_eod=args.append_eod,
        workers=args.workers,
        input_format=args.input_format,
        text_unit=args.text_unit,
        on_error=args.on_error,
        backend=args.tokenizer_backend,
        overwrite=args.overwrite,
        log_interval=args.log_interval,
    )


def print_result(result: PreprocessResult) -> None:
    """Prints what was written."""
    for prefix, manifest in zip(result.prefixes, result.manifests, strict=True):
        print(
            f"{prefix}: {manifest.documents:,} documents, {manifest.tokens:,} tokens "
            f"({manifest.dtype})"
        )
    megabytes = result.text_bytes / 1e6
    print(
        f"{megabytes:,.1f} MB of text in {result.seconds:.1f} s, "
        f"{megabytes / result.seconds:.1f} MB/s"
    )
    for reason, count in sorted(result.skipped.items()):
        print(f"skipped {count:,}: {reason}")


def main() -> None:
    """Runs the tool."""
    print_result(preprocess(build_config(parse_args())))


if __name__ == "__main__":
    run_tool(main)
