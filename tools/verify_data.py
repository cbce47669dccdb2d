#!/usr/bin/env python
r"""Check tokenised data sets in full; training itself checks only what is cheap.

    python tools/verify_data.py data/web_text_document data/qa_text_document \
        --tokenizer-type SentencePieceTokenizer --tokenizer-model tok.model
    python tools/verify_data.py data/qa_text_document --against data/web_text_document
    python tools/verify_data.py data/qa_text_document --benchmark openai/gsm8k/main/test.jsonl \
        --tokenizer-type SentencePieceTokenizer --tokenizer-model tok.model
    python tools/verify_data.py data/web_*_text_document.idx --duplicates --max-memory 40

Reads every token: the index against the tokens, every id against the vocabulary, counts and the digest of
the content against the manifest. With --against, finds documents, of 16 tokens or more, that the data sets
share with others, whether or not an end-of-document id ends them; of sets without manifests the tokenizer
tells it. With --duplicates, finds those that are copies of earlier ones, in the same data set or in one
before it. All is read once, or once for each part that fits --max-memory: with --against the data sets take
36 bytes a document and the others none, with --duplicates they take 48. With --benchmark, finds questions
most of whose tokens lie in runs of 11 that the data hold as well. The exit code is 0 if nothing is wrong,
which shared documents, copies and such questions are.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_ext.data.blend import bare_prefix
from megatron_ext.data.contamination import KNOWN, RUN, encode_texts, read_texts, shares_in
from megatron_ext.data.duplicates import find_duplicates
from megatron_ext.data.indexed import bin_path
from megatron_ext.data.read_digests import check_tokenizers, comparable
from megatron_ext.data.shared_documents import find_overlaps
from megatron_ext.data.tokenizers import (
    TOKENIZER_TYPES,
    Tokenizer,
    TokenizerSpec,
    build_reference,
    tokenizer_digest,
)
from megatron_ext.data.verify import check_index, verify
from megatron_ext.exceptions import ConfigError, DataError
from tools.common import ToolParser, run_tool, usable_cores


def parse_args() -> argparse.Namespace:
    """Parse the command line."""
    parser = ToolParser(description=__doc__, allow_abbrev=False)
    data: dict[str, Any] = {"nargs": "+", "type": bare_prefix}
    parser.add_argument("prefix", **data, help="data sets, as --data-path names them")
    parser.add_argument("--tokenizer-type", choices=TOKENIZER_TYPES)
    parser.add_argument(
        "--tokenizer-model",
        help="tokenizer to check the ids against; without it they are checked against the manifest",
    )
    parser.add_argument(
        "--against",
        **data,
        default=[],
        metavar="PREFIX",
        help="other data sets, to find documents that both sides have",
    )
    parser.add_argument(
        "--duplicates", action="store_true", help="find copies of earlier documents"
    )
    parser.add_argument(
        "--max-memory",
        type=float,
        default=1.0,
        metavar="GB",
        help="memory for the digests of documents",
    )
    parser.add_argument(
        "--workers", type=int, default=usable_cores(), help="processes that compare documents"
    )
    parser.add_argument(
        "--benchmark",
        nargs="+",
        type=Path,
        default=[],
        metavar="FILE",
        help="JSON lines or Parquet with questions that should not be in the data; needs a tokenizer",
    )
    parser.add_argument(
        "--benchmark-keys",
        nargs="+",
        default=["question"],
        metavar="KEY",
        help="fields of these files that hold the questions (default: question)",
    )
    args = parser.parse_args()
    if args.benchmark and args.tokenizer_model is None:
        raise ConfigError("--benchmark: expected --tokenizer-type and --tokenizer-model beside it")
    if (args.tokenizer_type is None) != (args.tokenizer_model is None):
        raise ConfigError(
            "--tokenizer-type, --tokenizer-model: expected both or neither, found one"
        )
    if not args.max_memory > 0:
        raise ConfigError(f"--max-memory: expected more than 0, found {args.max_memory}")
    if args.workers < 1:
        raise ConfigError(f"--workers: expected at least 1, found {args.workers}")
    named = {bin_path(prefix).resolve() for prefix in args.prefix}
    if args.duplicates and len(named) < len(args.prefix):
        raise ConfigError(
            "--duplicates: expected each data set once, found one that is named twice"
        )
    return args


def _spec(args: argparse.Namespace) -> TokenizerSpec:
    return TokenizerSpec(tokenizer_type=args.tokenizer_type, tokenizer_model=args.tokenizer_model)


def _bar(label: str, total: int | None = None) -> tqdm:
    return tqdm(total=total, unit="B", unit_scale=True, desc=label, disable=None)


def _size(prefix: str) -> int:
    path = bin_path(prefix)
    return path.stat().st_size if path.is_file() else 0


def check_sets(args: argparse.Namespace, tokenizer: Tokenizer | None) -> int:
    """Verify each data set and print what was found; the number of bad ones."""
    vocab_size = digest = None
    if tokenizer is not None:
        vocab_size, digest = tokenizer.vocab_size, tokenizer_digest(_spec(args))
    bad = 0
    for prefix in args.prefix:
        try:
            with _bar("verifying", _size(prefix)) as bar:
                found = verify(
                    prefix, vocab_size=vocab_size, tokenizer_digest=digest, advance=bar.update
                )
        except (DataError, OSError) as error:
            bad += 1
            print(f"BAD {error if isinstance(error, DataError) else f'{prefix}: {error}'}")
            continue
        size = found.summary
        note = (
            "" if found.has_digest else "; no digest of the content in a manifest to compare with"
        )
        print(
            f"ok  {prefix}: {size.documents:,} documents, {size.tokens:,} tokens, ids up to "
            f"{found.largest}{note}"
        )
    return bad


def check_overlaps(args: argparse.Namespace, tokenizer: Tokenizer | None) -> int:
    """Compare the data sets with the others; the number of pairs that share documents."""
    with _bar("comparing") as bar:
        found = find_overlaps(args.prefix, args.against, **_comparison(args, tokenizer, bar))
    bad = 0
    for prefix, overlaps in zip(args.prefix, found, strict=True):
        for other, overlap in zip(args.against, overlaps, strict=True):
            if overlap.documents:
                bad += 1
                numbers = ", ".join(map(str, overlap.examples))
                print(
                    f"BAD {other}: {overlap.documents:,} documents ({overlap.distinct:,} distinct) are in "
                    f"{prefix} too, numbers {numbers} among them"
                )
            else:
                print(f"ok  {other} shares no document with {prefix}")
    return bad


def check_benchmarks(args: argparse.Namespace, tokenizer: Tokenizer, texts: list[list[str]]) -> int:
    """Look for questions in each data set; the number of pairs of a set and a file that has known ones.

    Args:
        args: the command line.
        tokenizer: of the data.
        texts: of each file of --benchmark.
    """
    ids = encode_texts([text for part in texts for text in part], tokenizer)
    ends = np.cumsum([len(part) for part in texts])
    bad = 0
    for prefix in args.prefix:
        with _bar("looking for questions", _size(prefix)) as bar:
            shares = shares_in(prefix, ids, vocab_size=tokenizer.vocab_size, advance=bar.update)
        for path, found in zip(args.benchmark, np.split(shares, ends[:-1]), strict=True):
            known = np.flatnonzero(found >= KNOWN)
            bad += bool(len(known))
            named = f" ({', '.join(map(str, known[:5] + 1))} among them)" if len(known) else ""
            touched, short = int((found > 0).sum()), int(np.isnan(found).sum())
            print(
                f"{'BAD' if len(known) else 'ok '} {path}: of {len(found):,} texts {len(known):,}{named} "
                f"stand in {prefix} by {KNOWN:.0%} of their tokens or more, {touched:,} by {RUN} in a row; "
                f"{short:,} are too short to tell"
            )
    return bad


def check_duplicates(args: argparse.Namespace, tokenizer: Tokenizer | None) -> int:
    """Look for copies of earlier documents; the number of data sets that hold some."""
    with _bar("comparing") as bar:
        found = find_duplicates(args.prefix, **_comparison(args, tokenizer, bar))
    for prefix, copies in zip(args.prefix, found, strict=True):
        if not copies.documents:
            print(f"ok  {prefix}: no document is a copy of an earlier one")
            continue
        size = copies.summary
        examples = ", ".join(
            f"{number} (= {first}{'' if origin == prefix else f' of {origin}'})"
            for number, origin, first in copies.examples
        )
        print(
            f"BAD {prefix}: {copies.documents:,} of {size.documents:,} documents, with "
            f"{copies.tokens / size.tokens:.2%} of the tokens, are copies of earlier ones, "
            f"{copies.elsewhere:,} of them of other data sets', numbers {examples} among them"
        )
    return sum(copies.documents > 0 for copies in found)


def _comparison(args: argparse.Namespace, tokenizer: Tokenizer | None, bar: tqdm) -> dict[str, Any]:
    """What comparisons of documents are told."""

    def progress(read: int, total: int) -> None:
        bar.total = total
        bar.update(read)

    return {
        "max_bytes": max(1, int(args.max_memory * 1e9)),
        "eod_id": None if tokenizer is None else tokenizer.eod_id,
        "workers": args.workers,
        "progress": progress,
    }


def main() -> None:
    """Run the checks."""
    args = parse_args()
    if args.against or args.duplicates:  # before hours of reading
        check_tokenizers([*args.prefix, *args.against])
        for other in comparable(args.against, eod_id=None) if args.against else ():
            check_index(other.prefix, other.summary)
    tokenizer = None if args.tokenizer_model is None else build_reference(_spec(args))
    texts = [read_texts(path, args.benchmark_keys) for path in args.benchmark]
    bad = check_sets(args, tokenizer)
    if not bad:  # documents of a broken index are none
        bad += check_overlaps(args, tokenizer) if args.against else 0
        bad += check_duplicates(args, tokenizer) if args.duplicates else 0
        if texts and tokenizer is not None:
            bad += check_benchmarks(args, tokenizer, texts)
    if bad:
        raise DataError(f"{bad} checks failed, see above")


if __name__ == "__main__":
    run_tool(main)
