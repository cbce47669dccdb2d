"""`PREFIX.manifest.json`: which tokenizer made a data set, so that training can refuse another one.

Megatron's own preprocessing writes no such file. Without it the largest id of a data set is known
only by reading all of it, so `check_prefix` looks at 64 evenly spaced spots of 4,096 tokens each: a
vocabulary that is far too small is found, one that differs in rare ids or in meaning is not.
"""

import dataclasses
import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin

from megatron_ext.data.atomic import write_atomically
from megatron_ext.data.document_digests import SAMPLED_DOCUMENTS
from megatron_ext.data.indexed import IndexSummary, bin_path, read_index_summary, sample_max_token
from megatron_ext.exceptions import DataError

MANIFEST_SUFFIX = ".manifest.json"
FORMAT_VERSION = 1
_GIVEN = "the tokenizer given"
_DIGESTS = re.compile("([0-9a-f]{16} )*")


@dataclass(frozen=True, kw_only=True)
class Source:
    """One input file."""

    path: str
    bytes: int


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a data set was made from.

    Attributes:
        tokenizer_type: Megatron's name of it, as `--tokenizer-type`.
        tokenizer_model: File name or hub name of the model, without its directory.
        tokenizer_digest: SHA-256 of the model, from `tokenizers.tokenizer_digest`.
        vocab_size: Pieces of the tokenizer, without padding.
        eod_id: Id that ends a document, None if the tokenizer has none.
        append_eod: Whether each non-empty document ends in it.
        dtype: NumPy name of the type on disk.
        documents: Documents, empty ones included.
        sequences: Non-empty sequences.
        tokens: Tokens.
        max_token_id: Largest id in the file.
        skipped: Inputs left out by `--on-error skip`, by reason.
        backend: What encoded it: `gigatoken` or `reference`; joined data sets may name both.
        sources: Input files, in order.
        content_digest: SHA-256 of `.bin` and then `.idx`; None in manifests of earlier versions.
        document_sample: The smallest of the documents' digests, at most `document_digests.SAMPLED_DOCUMENTS`,
            ascending; None in manifests of earlier versions.
        chat_template: What rendered the conversations that the documents are: the name of a file or folder,
            `tokenizer`, or `built-in`; None if they are text as it was.
        chat_template_digest: SHA-256 of that template.
        before_text: Ids that the tokenizer puts before each text of its own accord, such as BOS; None of
            conversations, and in manifests of earlier versions.
        after_text: Those that it puts behind it.
        format_version: Version of this file's format.
    """

    tokenizer_type: str
    tokenizer_model: str
    tokenizer_digest: str
    vocab_size: int
    eod_id: int | None
    append_eod: bool
    dtype: str
    documents: int
    sequences: int
    tokens: int
    max_token_id: int
    skipped: dict[str, int]
    backend: str
    sources: list[Source]
    content_digest: str | None = None
    document_sample: list[str] | None = None
    chat_template: str | None = None
    chat_template_digest: str | None = None
    before_text: list[int] | None = None
    after_text: list[int] | None = None
    format_version: int = FORMAT_VERSION

    def to_json(self) -> bytes:
        """The content of the file."""
        text = json.dumps(dataclasses.asdict(self), indent=2, ensure_ascii=False) + "\n"
        # File names need not be UTF-8: Python's stand-ins for such bytes are written as JSON's escapes.
        return text.encode(errors="backslashreplace")


def manifest_path(prefix: str | Path) -> Path:
    """Path of the manifest of a data set."""
    return Path(f"{prefix}{MANIFEST_SUFFIX}")


def write_manifest(prefix: str | Path, manifest: Manifest, *, overwrite: bool = False) -> None:
    """Writes the manifest of a data set, atomically."""
    write_atomically(manifest_path(prefix), manifest.to_json(), overwrite=overwrite)


def read_manifest(prefix: str | Path) -> Manifest | None:
    """Reads the manifest of a data set; None if it has none.

    Raises:
        DataError: The file is unreadable or of another format version.
    """
    path = manifest_path(prefix)
    try:
        fields: dict[str, Any] = json.loads(path.read_bytes())
        version = fields.get("format_version")
    except FileNotFoundError:
        return None
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise DataError(f"{path} cannot be read as a manifest: {error}") from error
    if version != FORMAT_VERSION:
        raise DataError(f"{path}: expected format version {FORMAT_VERSION}, found {version!r}")
    try:
        sources = [Source(**source) for source in fields.pop("sources")]
        manifest = Manifest(**fields, sources=sources)
    except (TypeError, KeyError) as error:
        raise DataError(f"{path} is not a complete manifest: {error}") from error
    for field in dataclasses.fields(manifest):
        value = getattr(manifest, field.name)
        if not _fits(value, field.type):
            raise DataError(
                f"{path}: expected {field.name} of type {field.type}, found {value!r:.60}"
            )
    sample = "".join(f"{text} " for text in manifest.document_sample or ())
    if not _DIGESTS.fullmatch(sample) or len(sample) != 17 * len(manifest.document_sample or ()):
        raise DataError(f"{path}: expected digests of 16 hexadecimal digits in document_sample")
    return manifest


def _fits(value: Any, kind: Any) -> bool:
    """Whether a value of JSON has the type of a field; a bool is no int."""
    if isinstance(kind, UnionType):
        return any(_fits(value, each) for each in get_args(kind))
    if get_origin(kind) is list:
        # The sample of a thousand manifests is a million values: no call for each of them.
        return isinstance(value, list) and set(map(type, value)) <= {get_args(kind)[0]}
    if get_origin(kind) is dict:
        return isinstance(value, dict) and set(map(type, value.values())) <= {get_args(kind)[1]}
    return type(value) is kind


def join_manifests(
    manifests: Sequence[Manifest], summary: IndexSummary, content_digest: str
) -> Manifest:
    """The manifest that one run over the sources of all would have written.

    Args:
        manifests: In the order of the data; all of one tokenizer, `append_eod`, `eod_id` and template.
        summary: Of all the data together.
        content_digest: Of it.
    """
    skipped: Counter[str] = Counter()
    for each in manifests:
        skipped.update(each.skipped)
    samples = [each.document_sample for each in manifests if each.document_sample is not None]
    # As many digits each, so text sorts as numbers do. Of a part without a sample the smallest are unknown.
    sample = sorted(set[str]().union(*samples))[:SAMPLED_DOCUMENTS]
    return dataclasses.replace(
        manifests[0],
        dtype=summary.dtype.name,
        documents=summary.documents,
        sequences=summary.sequences,
        tokens=summary.tokens,
        max_token_id=max(each.max_token_id for each in manifests),
        skipped=dict(skipped),
        backend=" and ".join(sorted({each.backend for each in manifests})),
        sources=[source for each in manifests for source in each.sources],
        content_digest=content_digest,
        document_sample=sample if len(samples) == len(manifests) else None,
        **{name: _known_of_all(manifests, name) for name in ("before_text", "after_text")},
    )


def _known_of_all(manifests: Sequence[Manifest], name: str) -> Any:
    """What all have alike, None if one is of an earlier version and does not tell."""
    values = [getattr(each, name) for each in manifests]
    return None if None in values else values[0]


def check_prefix(
    prefix: str | Path,
    *,
    vocab_size: int,
    tokenizer_digest: str | None = None,
    eod_id: int | None = None,
    other: str = _GIVEN,
) -> IndexSummary:
    """Checks, without reading the data, that a data set is whole and made for a vocabulary.

    Costs a few small reads; with no manifest up to 64 more (see the module's docstring).

    Args:
        prefix: Path without `.bin` and `.idx`, as in `--data-path`.
        vocab_size: Pieces of the tokenizer that training uses, without padding.
        tokenizer_digest: Its digest from `tokenizers.tokenizer_digest`, None to compare sizes only.
        eod_id: Id that training takes for the end of a document, None to leave it uncompared. The digest of
            a Hugging Face tokenizer does not tell: `tokenizer_config.json` names the token.
        other: What the tokenizer is called in messages.

    Returns:
        Size and type of the data set.

    Raises:
        DataError: Names the file: missing, truncated, empty, or of another tokenizer.
    """
    summary = read_index_summary(prefix)
    manifest = read_manifest(prefix)
    if manifest is None:
        largest = sample_max_token(prefix, summary.dtype)
        if largest >= vocab_size:
            raise DataError(
                f"{bin_path(prefix)} holds token id {largest}, but the tokenizer has {vocab_size} "
                "pieces: the data were made with another tokenizer"
            )
        return summary
    path = manifest_path(prefix)
    if (manifest.tokens, manifest.sequences) != (summary.tokens, summary.sequences):
        raise DataError(
            f"{path} describes {manifest.tokens} tokens in {manifest.sequences} sequences, but the "
            f"data set holds {summary.tokens} in {summary.sequences}: it belongs to other data"
        )
    check_tokenizer(
        path, manifest, vocab_size=vocab_size, tokenizer_digest=tokenizer_digest, other=other
    )
    if manifest.append_eod and eod_id is not None and manifest.eod_id != eod_id:
        raise DataError(
            f"{path}: documents end in token id {manifest.eod_id}, but with the tokenizer in use they end "
            f"in {eod_id}: the data were made with {_made_with(manifest)} of another end-of-text token"
        )
    return summary


def check_tokenizer(
    path: Path,
    manifest: Manifest,
    *,
    vocab_size: int,
    tokenizer_digest: str | None = None,
    other: str = _GIVEN,
) -> None:
    """Checks that data were made with a tokenizer.

    Args:
        path: Of the manifest, for messages.
        manifest: Of the data.
        vocab_size: Pieces of the tokenizer.
        tokenizer_digest: Its digest, None to compare sizes only.
        other: What it is called in messages.

    Raises:
        DataError: They were made with another one.
    """
    if manifest.vocab_size != vocab_size:
        raise DataError(
            f"{path}: the data were made with {_made_with(manifest)} of {manifest.vocab_size} pieces, but "
            f"{other} has {vocab_size}"
        )
    if tokenizer_digest is not None and manifest.tokenizer_digest != tokenizer_digest:
        raise DataError(
            f"{path}: the data were made with {_made_with(manifest)} (SHA-256 "
            f"{manifest.tokenizer_digest[:12]}...), but {other} is another one "
            f"({tokenizer_digest[:12]}...)"
        )


def _made_with(manifest: Manifest) -> str:
    return f"{manifest.tokenizer_type} {manifest.tokenizer_model}"
