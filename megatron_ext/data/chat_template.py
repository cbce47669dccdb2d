"""From messages to tokens: the chat template, and which tokens the model must write by itself.

Text is tokenised in segments, each by itself: what precedes an assistant's answer, up to and including
the generation prompt, is one segment; the answer with its end of turn is the next. Offsets of a
tokenisation of the whole text would not do: a BPE token may cover the end of the prompt and the start of
the answer, would then be neither learnt nor ignored rightly, and never appears at inference, where the
prompt ends before the answer exists. With segments the tokens of a prompt are at inference those of
training, token for token, as long as both come from `ChatTemplate.encode`; another engine that tokenises
the text of `render` in one piece gives the same for a first answer, and may differ at the start of an
earlier answer in the history.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import jinja2

from megatron_ext.data.chat import Message
from megatron_ext.data.chat_environment import environment
from megatron_ext.data.tokenizers import (
    SENTENCEPIECE_TYPES,
    HuggingFaceReference,
    SentencePieceReference,
    TokenizerSpec,
    build_reference,
)
from megatron_ext.exceptions import ConfigError, DataError

TEMPLATE_FILE = "chat_template.jinja"
# Plain text, no newline: any tokenizer has pieces for it, also those that turn newlines into spaces.
BUILT_IN = (
    "{%- for message in messages -%}"
    "{{- message['role'] | capitalize + ':' -}}"
    "{{- '' if message['role'] == 'assistant' else ' ' -}}"
    "{{- message['content'] + eos_token -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- 'Assistant:' -}}{%- endif -%}"
)
# SentencePiece does not read control tokens from text. Between Unicode noncharacters, which no text for
# interchange may have, they cannot be forged by the content of a message either.
_BOS, _EOS = "\ufdd0bos\ufdd1", "\ufdd0eos\ufdd1"
_PROBE: list[Message] = [
    {"role": "user", "content": "one"},
    {"role": "assistant", "content": "two"},
    {"role": "user", "content": "three"},
    {"role": "assistant", "content": "four"},
]


class ChatTemplate:
    """A Jinja chat template and the tokenizer that its text is for.

    Args:
        source: the template; it sees what it sees in ``transformers`` (of a SentencePiece model, the special
            tokens BOS and EOS), but no clock, so that text does not change with the day.
        tokenizer: type and model of the tokenizer.

    Attributes:
        source: the template.
        end_of_turn: id of the token that ends an assistant's answer.

    Raises:
        ConfigError: the template has an error, or does not tell answers from prompts (see `encode`).
    """

    def __init__(self, source: str, tokenizer: TokenizerSpec) -> None:
        self.source = source
        self._text = _special_text(tokenizer)
        try:
            self._template = environment().from_string(source)
            ids, mask = self.encode(_PROBE)
        except (jinja2.TemplateError, DataError) as error:
            raise ConfigError(f"--chat-template: {error}") from error
        self.end_of_turn = [i for i, written in zip(ids, mask, strict=True) if written][-1]

    @property
    def eod_id(self) -> int:
        """The token that ends a document."""
        return self._text.eod_id

    @property
    def special_tokens(self) -> dict[str, Any]:
        """What the template calls the special tokens; not all of it is in the tokenizer's digest."""
        return self._text.tokens

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool = False) -> str:
        """The text of a conversation, for people and for engines that tokenise by themselves.

        Args:
            messages: the turns.
            add_generation_prompt: whether to end with what an answer starts after.
        """
        text = self._render(messages, add_generation_prompt)
        for marker, visible in self._text.visible.items():
            text = text.replace(marker, visible)
        return text

    def encode(
        self, messages: Sequence[Message], *, add_generation_prompt: bool = False
    ) -> tuple[list[int], list[int]]:
        """The tokens of a conversation, and which of them the model writes.

        The tokens of ``messages[:i]`` with a generation prompt are the first tokens of ``messages[:i + 1]``
        wherever turn ``i`` is the assistant's.

        Args:
            messages: the turns.
            add_generation_prompt: whether to end with what an answer starts after.

        Returns:
            Token ids; and for each 1 if it belongs to an assistant's answer or is the token that ends its
            turn, else 0.

        Raises:
            DataError: the template cannot render these turns, a turn holds a special token as text, or the
                template rewrites earlier turns, changes an answer or ends its turn with no special token.
        """
        self._refuse_special(messages)
        ids: list[int] = []
        mask: list[int] = []
        done = ""

        def add(text: str, counts: int) -> None:
            nonlocal done
            new = self._text.encode(text)
            ids.extend(new)
            mask.extend([counts] * len(new))
            done += text

        for index, message in enumerate(messages):
            if message["role"] == "assistant":
                prompt = self._render(messages[:index], True)
                add(_after(done, prompt), 0)
                turn = _after(prompt, self._render(messages[: index + 1], False))
                add(self._answer(turn, message["content"]), 1)
        add(_after(done, self._render(messages, add_generation_prompt)), 0)
        return ids, mask

    def without_special(self, text: str) -> str:
        """A text as the content of a message may be: what spells a special token is left out."""
        return self._text.special.sub("", text)

    def _render(self, messages: Sequence[Message], add_generation_prompt: bool) -> str:
        try:
            return self._template.render(
                messages=messages,
                add_generation_prompt=add_generation_prompt,
                tools=None,
                documents=None,
                **self._text.tokens,
            )
        except (jinja2.TemplateError, TypeError, ValueError, KeyError) as error:
            raise DataError(f"expected turns that the chat template renders, {error}") from error

    def _answer(self, turn: str, content: str) -> str:
        """The part of a turn that the model writes: up to and with the token that ends it."""
        # Templates may trim a text and put something before it; the text may happen to occur in that.
        text = content.strip()
        starts = [found.start() for found in re.finditer(f"(?={re.escape(text)})", turn)]
        inside = {i for token in self._text.special.finditer(turn) for i in range(*token.span())}
        starts = [start for start in starts if start not in inside]
        if not starts:
            raise DataError("expected a chat template that leaves the assistant's text as it is")
        ends = [self._text.special.search(turn, start + len(text)) for start in starts]
        end = next((end for end in reversed(ends) if end is not None), None)
        if end is None:
            raise DataError(
                "expected a chat template that ends an assistant's turn with a special token, such as "
                "{{ eos_token }}; without one the model would never learn to stop"
            )
        return turn[: end.end()]

    def _refuse_special(self, messages: Sequence[Message]) -> None:
        for index, message in enumerate(messages, start=1):
            if found := self._text.special.search(message["content"]):
                raise DataError(
                    f"expected no special token in the text of turn {index}, found {found.group()!r}"
                )


def load_template(tokenizer: TokenizerSpec, *, path: str | Path | None = None) -> ChatTemplate:
    """The template of a file, or else the tokenizer's own, or else the built-in one.

    Args:
        tokenizer: type and model of the tokenizer.
        path: a Jinja file, or a checkpoint directory of a chat run, which holds one.

    Raises:
        ConfigError: the file is missing, or the template cannot be used.
    """
    if path is not None:
        file = Path(path) / TEMPLATE_FILE if Path(path).is_dir() else Path(path)
        if not file.is_file():
            raise ConfigError(f"--chat-template: expected a Jinja file, found nothing at {file}")
        return ChatTemplate(file.read_text(encoding="utf-8"), tokenizer)
    return ChatTemplate(_special_text(tokenizer).template or BUILT_IN, tokenizer)


class _SpecialText(Protocol):
    """A tokenizer of text in which some strings are special tokens."""

    tokens: dict[str, Any]  # what a template calls the special tokens: ``eos_token`` and others
    eod_id: int
    special: re.Pattern[str]
    visible: dict[str, str]
    template: str | None

    def encode(self, text: str) -> list[int]: ...


class _SentencePieceText:
    """SentencePiece with markers for its control tokens."""

    template: str | None = None

    def __init__(self, reference: SentencePieceReference) -> None:
        self._processor = reference.processor
        if reference.eod_id is None:
            raise ConfigError("--tokenizer-model: expected an end-of-sentence token, found none")
        self.eod_id = reference.eod_id
        self._ids = {_EOS: self.eod_id}
        if (bos := int(self._processor.bos_id())) >= 0:
            self._ids[_BOS] = bos
        self.tokens: dict[str, Any] = {
            "eos_token": _EOS,
            "bos_token": _BOS if _BOS in self._ids else "",
        }
        self.special = re.compile(f"({_BOS}|{_EOS})")
        self.visible = {
            marker: str(self._processor.id_to_piece(token)) for marker, token in self._ids.items()
        }

    def encode(self, text: str) -> list[int]:
        ids: list[int] = []
        for part in self.special.split(text):
            ids += [self._ids[part]] if part in self._ids else self._processor.encode(part)
        return ids


class _HuggingFaceText:
    """A Hugging Face tokenizer, which reads its special tokens from text."""

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
        template = tokenizer.chat_template
        self.template: str | None = (
            template.get("default") if isinstance(template, dict) else template
        )

    def encode(self, text: str) -> list[int]:
        return list(self._tokenizer(text, add_special_tokens=False).input_ids) if text else []


@functools.cache
def _special_text(tokenizer: TokenizerSpec) -> _SpecialText:
    reference = build_reference(tokenizer)
    if tokenizer.tokenizer_type in SENTENCEPIECE_TYPES:
        assert isinstance(reference, SentencePieceReference)
        return _SentencePieceText(reference)
    assert isinstance(reference, HuggingFaceReference)
    return _HuggingFaceText(reference)


def _after(start: str, text: str) -> str:
    if not text.startswith(start):
        raise DataError(
            "expected a chat template under which each turn only adds to the text before it (the prompt "
            "at inference must be what was trained on); this one rewrites earlier turns"
        )
    return text[len(start) :]
