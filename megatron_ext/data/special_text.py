"""Text in which some strings are special tokens, as chat templates write it, and its tokenizers."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Protocol

from megatron_ext.data.tokenizers import (
    SENTENCEPIECE_TYPES,
    HuggingFaceReference,
    SentencePieceReference,
    TokenizerSpec,
    around_text,
    build_reference,
)
from megatron_ext.exceptions import ConfigError

# SentencePiece does not read control tokens from text. Between Unicode noncharacters, which no text for
# interchange may have, they cannot be forged by the content of a message either.
_BOS, _EOS = "\ufdd0bos\ufdd1", "\ufdd0eos\ufdd1"


class SpecialText(Protocol):
    """A tokenizer of text in which some strings are special tokens.

    Attributes:
        tokens: what a template calls the special tokens: ``eos_token`` and others.
        eod_id: the token that ends a document.
        special: finds special tokens in text.
        special_ids: those that the tokenizer does not read from text.
        visible: what people are shown in their place.
        template: the tokenizer's own chat template.
        begins_with_bos: whether the tokenizer begins texts with BOS of its own accord.
    """

    tokens: dict[str, Any]
    eod_id: int
    special: re.Pattern[str]
    special_ids: Mapping[str, int]
    visible: dict[str, str]
    template: str | None
    begins_with_bos: bool

    def split(self, text: str) -> list[str]:
        """The parts that are tokenised each by itself, each of `special_ids` a part of its own."""

    def encode(self, text: str) -> list[int]:
        """The tokens of a text, without any around it."""


class _SentencePieceText:
    """SentencePiece with markers for its control tokens."""

    template: str | None = None
    begins_with_bos = False

    def __init__(self, reference: SentencePieceReference) -> None:
        self._processor = reference.processor
        if reference.eod_id is None:
            raise ConfigError("--tokenizer-model: expected an end-of-sentence token, found none")
        self.eod_id = reference.eod_id
        ids = {_EOS: self.eod_id}
        if (bos := int(self._processor.bos_id())) >= 0:
            ids[_BOS] = bos
        self.special_ids: Mapping[str, int] = ids
        self.tokens: dict[str, Any] = {
            "eos_token": _EOS,
            "bos_token": _BOS if _BOS in ids else "",
        }
        self.special = re.compile(f"({_BOS}|{_EOS})")
        self.visible = {
            marker: str(self._processor.id_to_piece(token))
            for marker, token in self.special_ids.items()
        }

    def split(self, text: str) -> list[str]:
        return self.special.split(text)

    def encode(self, text: str) -> list[int]:
        ids: list[int] = []
        for part in self.split(text):
            known = self.special_ids.get(part)
            ids += self._processor.encode(part) if known is None else [known]
        return ids


class _HuggingFaceText:
    """A Hugging Face tokenizer, which reads its special tokens from text."""

    special_ids: Mapping[str, int] = MappingProxyType({})

    def __init__(self, reference: HuggingFaceReference) -> None:
        tokenizer = self._tokenizer = reference.tokenizer
        if reference.eod_id is None:
            raise ConfigError("--tokenizer-model: expected an end-of-sequence token, found none")
        self.eod_id = reference.eod_id
        names = {"bos_token": "", "eos_token": tokenizer.sep_token}
        self.tokens: dict[str, Any] = names | tokenizer.special_tokens_map
        added = [t.content for t in tokenizer.added_tokens_decoder.values() if t.special]
        # Longest first: one special token may be the start of another.
        tokens = sorted({*tokenizer.all_special_tokens, *added}, key=len, reverse=True)
        self.special = re.compile("|".join(map(re.escape, tokens)))
        self.visible: dict[str, str] = {}
        self.begins_with_bos = around_text(reference)[0][:1] == [tokenizer.bos_token_id]
        template = tokenizer.chat_template
        self.template: str | None = (
            template.get("default") if isinstance(template, dict) else template
        )

    def split(self, text: str) -> list[str]:
        return [text]

    def encode(self, text: str) -> list[int]:
        return list(self._tokenizer(text, add_special_tokens=False).input_ids) if text else []


@functools.cache
def special_text(tokenizer: TokenizerSpec) -> SpecialText:
    """The tokenizer as templates need it, loaded once.

    Raises:
        ConfigError: it cannot be loaded, or has no token that ends a document.
    """
    reference = build_reference(tokenizer)
    if tokenizer.tokenizer_type in SENTENCEPIECE_TYPES:
        assert isinstance(reference, SentencePieceReference)
        return _SentencePieceText(reference)
    assert isinstance(reference, HuggingFaceReference)
    return _HuggingFaceText(reference)
