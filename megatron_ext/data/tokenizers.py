"""Exact tokenizers for preprocessing, and the digest by which training recognises them.

They call `sentencepiece` and `transformers` as Megatron's own wrappers do with their
default settings (a test compares them), without the 3 s that importing `megatron.core` takes in
each worker.
"""

import hashlib
import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from megatron_ext.exceptions import ConfigError

SENTENCEPIECE_TYPES = ("SentencePieceTokenizer", "GPTSentencePieceTokenizer", "Llama2Tokenizer")
TOKENIZER_TYPES = (*SENTENCEPIECE_TYPES, "HuggingFaceTokenizer")
# The files of a Hugging Face vocabulary: any one of these sets.
_VOCABULARIES = (
    ("tokenizer.json",),
    ("tokenizer.model",),
    ("vocab.json", "merges.txt"),
    ("vocab.txt",),
)
_EXPECTED = "expected a folder with a tokenizer, or a name on the Hugging Face hub (OWNER/NAME)"
# Beside a tokenizer that was made of a SentencePiece model: the digests of that and of `tokenizer.json`.
ORIGIN_FILE, _MADE = "sentencepiece_origin.json", "tokenizer.json"
# Flat ids `[tokens]` and int64 bounds `[texts + 1]` of each text in them.
Encoded = tuple[NDArray[Any], NDArray[np.int64]]


@dataclass(frozen=True, kw_only=True)
class TokenizerSpec:
    """A tokenizer, in Megatron's terms.

    Attributes:
        tokenizer_type: One of `TOKENIZER_TYPES`.
        tokenizer_model: SentencePiece file; Hugging Face directory or hub name.
        include_special_tokens: Hugging Face only: whether its template may add tokens such as BOS.
        use_fast: Hugging Face only: whether to prefer its fast implementation.
        trust_remote_code: Hugging Face only: whether code from the hub may run.
    """

    tokenizer_type: str
    tokenizer_model: str
    include_special_tokens: bool = True
    use_fast: bool = True
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        if self.tokenizer_type not in TOKENIZER_TYPES:
            raise ConfigError(
                f"--tokenizer-type: expected one of {', '.join(TOKENIZER_TYPES)}, "
                f"found {self.tokenizer_type!r}"
            )


class Tokenizer(Protocol):
    """What encoding needs of a tokenizer."""

    backend_name: str
    vocab_size: int
    eod_id: int | None

    def encode_batch(self, texts: Sequence[str]) -> Encoded:
        """Encodes texts one by one; returns flat ids and bounds."""


class SentencePieceReference:
    """SentencePiece itself, as `megatron.core` calls it with its legacy mode off."""

    backend_name = "reference"

    def __init__(self, spec: TokenizerSpec) -> None:
        import sentencepiece

        check_found(spec)
        path = Path(spec.tokenizer_model)
        try:
            self.processor = sentencepiece.SentencePieceProcessor(model_file=str(path))
        except (RuntimeError, OSError) as error:
            raise ConfigError(
                f"--tokenizer-model {path} is not a SentencePiece model: {error}"
            ) from error
        self.vocab_size = int(self.processor.vocab_size())
        eos = int(self.processor.eos_id())
        self.eod_id = eos if eos >= 0 else None

    def encode_batch(self, texts: Sequence[str]) -> Encoded:
        """Encodes texts one by one."""
        return flatten([self.processor.encode(text) for text in texts])


class HuggingFaceReference:
    """`transformers`, as `megatron.core`'s HuggingFaceTokenizer calls it; `flag` named it, for messages."""

    backend_name = "reference"

    def __init__(self, spec: TokenizerSpec, *, flag: str = "--tokenizer-model") -> None:
        check_found(spec, flag=flag)
        from transformers import AutoTokenizer
        from transformers.utils import logging as transformers_logging

        # Documents are longer than any model's context: its warning about that says nothing here.
        transformers_logging.set_verbosity_error()
        try:
            self.tokenizer: Any = AutoTokenizer.from_pretrained(
                spec.tokenizer_model,
                use_fast=spec.use_fast,
                trust_remote_code=spec.trust_remote_code,
            )
        except Exception as error:
            raise ConfigError(_why_not_loaded(spec.tokenizer_model, flag, error)) from error
        self.include_special_tokens = spec.include_special_tokens
        self.vocab_size = len(self.tokenizer)
        # Megatron takes the separator for the end of a document where no end token is named.
        token = self.tokenizer.eos_token or self.tokenizer.sep_token
        eod: Any = None if token is None else self.tokenizer.convert_tokens_to_ids(str(token))
        self.eod_id: int | None = eod

    def encode_batch(self, texts: Sequence[str]) -> Encoded:
        """Encodes texts one by one."""
        if self.include_special_tokens:
            return flatten([self.tokenizer(text).input_ids for text in texts])
        tokenize, to_ids = self.tokenizer.tokenize, self.tokenizer.convert_tokens_to_ids
        return flatten([to_ids(tokenize(text)) for text in texts])


def around_text(tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """Ids that a tokenizer puts before and behind each text of its own accord, such as BOS."""
    alone, letter = (tokenizer.encode_batch([text])[0].tolist() for text in ("", "a"))
    same = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(alone, letter, strict=False))
    count = len(list(same))
    return alone[:count], alone[count:]


def check_found(spec: TokenizerSpec, *, flag: str = "--tokenizer-model") -> None:
    """Refuse a tokenizer that is not there; `transformers` would ask the hub for it for 50 s.

    Args:
        spec: the tokenizer; a name that the hub may have is left to it.
        flag: what named it, for messages.

    Raises:
        ConfigError: there is no such file or folder.
    """
    model = spec.tokenizer_model
    if spec.tokenizer_type in SENTENCEPIECE_TYPES:
        if not Path(model).is_file():
            raise ConfigError(f"{flag} {model}: no such file")
    elif not Path(model).exists() and not _may_be_on_the_hub(model):
        raise ConfigError(f"{flag}: {_EXPECTED}, found no folder {model}")


def _may_be_on_the_hub(model: str) -> bool:
    """Whether a name is not that of a place on this machine; without an owner only one that is cached."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    files = [name for names in _VOCABULARIES for name in names]
    if model.startswith(("/", ".", "~")) or model.endswith(tuple(Path(f).suffix for f in files)):
        return False
    try:
        validate_repo_id(model)
    except HFValidationError:
        return False
    return "/" in model or any(
        isinstance(try_to_load_from_cache(model, name), str) for name in files
    )


def _why_not_loaded(model: str, flag: str, error: Exception) -> str:
    """What is wrong with a Hugging Face tokenizer; `transformers` does not say that there is none."""
    path = Path(model)
    if not path.exists():
        return f"{flag}: {_EXPECTED}, found no folder {model}, and of the hub: {error}"
    if path.is_file():
        text = f"{flag}: expected the folder of a Hugging Face tokenizer, found a file, {model}"
        hint = "; --tokenizer-type SentencePieceTokenizer reads .model files"
        return text + (hint if flag == "--tokenizer-model" else "")
    vocabularies = [name for names in _VOCABULARIES for name in names]
    if path.is_dir() and not any((path / name).is_file() for name in vocabularies):
        return (
            f"{flag}: expected a folder with a Hugging Face tokenizer (tokenizer.json or a vocabulary), "
            f"found none in {model}"
        )
    return f"{flag} {model} cannot be loaded: {error}"


def build_reference(spec: TokenizerSpec) -> SentencePieceReference | HuggingFaceReference:
    """Loads the exact tokenizer.

    Raises:
        ConfigError: The model is missing or is no model of this type.
    """
    if spec.tokenizer_type in SENTENCEPIECE_TYPES:
        return SentencePieceReference(spec)
    return HuggingFaceReference(spec)


def tokenizer_digest(spec: TokenizerSpec) -> str:
    """SHA-256 of a tokenizer's model: its file, or the files of a Hugging Face vocabulary.

    A folder that `record_origin` has marked has the digest of the SentencePiece model that it was made of,
    whose ids it gives: data and models of the one are data and models of the other.

    Raises:
        ConfigError: There is no such tokenizer.
    """
    check_found(spec)
    if spec.tokenizer_type in SENTENCEPIECE_TYPES:
        return _sha256(Path(spec.tokenizer_model))
    if origin := _origin(Path(spec.tokenizer_model)):
        return origin
    from transformers.utils import cached_file

    digest = hashlib.sha256()
    for names in _VOCABULARIES:
        paths = [
            cached_file(spec.tokenizer_model, name, _raise_exceptions_for_missing_entries=False)
            for name in names
        ]
        if all(paths):
            for path in paths:
                digest.update(Path(str(path)).read_bytes())
            return digest.hexdigest()
    raise ConfigError(
        f"--tokenizer-model {spec.tokenizer_model}: no tokenizer.json or vocabulary file"
    )


def record_origin(folder: Path, model: Path) -> None:
    """Note in the folder of a Hugging Face tokenizer which SentencePiece model it was made of."""
    note = {name: _sha256(path) for name, path in (("of", model), ("is", folder / _MADE))}
    (folder / ORIGIN_FILE).write_text(json.dumps(note) + "\n")


def _origin(folder: Path) -> str | None:
    """The digest that `record_origin` noted, if the tokenizer is still the same."""
    try:
        note = json.loads((folder / ORIGIN_FILE).read_text())
        return str(note["of"]) if note["is"] == _sha256(folder / _MADE) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def bounds_of(lengths: Sequence[int] | NDArray[np.int64]) -> NDArray[np.int64]:
    """int64 `[texts + 1]` bounds of texts of these lengths."""
    return np.concatenate(([0], np.cumsum(lengths, dtype=np.int64)))


def flatten(rows: Sequence[Sequence[int]]) -> Encoded:
    """Joins lists of ids."""
    bounds = bounds_of([len(row) for row in rows])
    return np.fromiter(itertools.chain.from_iterable(rows), np.int64, count=int(bounds[-1])), bounds
