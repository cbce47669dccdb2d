"""What token ids are called in tables and figures."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from megatron_ext.data.tokenizers import (
    HuggingFaceReference,
    SentencePieceReference,
    TokenizerSpec,
    build_reference,
)


class Pieces:
    """Names of a tokenizer's ids.

    Args:
        spec: the tokenizer.

    Attributes:
        vocab_size: ids of the tokenizer, without padding.
        special: ids that stand for no text: ends of documents, padding, turns of a chat.

    Raises:
        ConfigError: the tokenizer cannot be loaded.
    """

    def __init__(self, spec: TokenizerSpec) -> None:
        reference = build_reference(spec)
        self.vocab_size = reference.vocab_size
        self._names: Any
        if isinstance(reference, SentencePieceReference):
            processor = reference.processor
            ids = range(self.vocab_size)
            special: Iterable[int] = [
                i for i in ids if processor.is_control(i) or processor.is_unused(i)
            ]
            self._names = processor.id_to_piece
        else:
            special = reference.tokenizer.all_special_ids
            self._names = _HuggingFaceNames(reference)
        ends = [] if reference.eod_id is None else [reference.eod_id]
        self.special = sorted({*special, *ends})

    def name(self, token: int) -> str:
        """An id's text on one line, with ``␣`` for a space and ``⏎`` for a line's end."""
        text = str(self._names(int(token))).replace("▁", "␣").replace(" ", "␣")
        return text.replace("\n", "⏎").replace("\t", "⇥").replace("<0x0A>", "⏎")


class _HuggingFaceNames:
    """The text of an id, or its entry in the vocabulary where it is no text by itself."""

    def __init__(self, reference: HuggingFaceReference) -> None:
        self._tokenizer = reference.tokenizer

    def __call__(self, token: int) -> str:
        text = str(self._tokenizer.decode([token]))
        if not text or "\ufffd" in text:
            return str(self._tokenizer.convert_ids_to_tokens(token))
        return text
