"""From messages to tokens: the chat template, and which tokens the model must write by itself.

Text is tokenised in segments, each by itself: what precedes an assistant's answer, up to and including
the generation prompt, is one segment; the answer with its end of turn is the next. Offsets of a
tokenisation of the whole text would not do: a BPE token may cover the end of the prompt and the start of
the answer, would then be neither learnt nor ignored rightly, and never appears at inference, where the
prompt ends before the answer exists. With segments the tokens of a prompt are at inference those of
training, token for token, as long as both come from `ChatTemplate.encode`; another engine that tokenises
the text of `render` in one piece gives the same for a first answer, and may differ at the start of an
earlier answer in the history.

All this needs a template under which a conversation only grows. Models that were tuned elsewhere bring
others, which move the system's text to the last question or drop earlier thoughts. They can be asked, with
prompts in one piece, and not be tuned on.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2

from megatron_ext.data.chat import Message
from megatron_ext.data.chat_environment import environment
from megatron_ext.data.special_text import special_text
from megatron_ext.data.tokenizers import TokenizerSpec
from megatron_ext.exceptions import ConfigError, DataError

logger = logging.getLogger(__name__)

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
# For a tokenizer that begins texts with BOS, as those were begun that the model was pre-trained on.
BUILT_IN_WITH_BOS = "{{- bos_token -}}" + BUILT_IN
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
        origin: where the template is from, for messages.

    Attributes:
        source: the template.
        origin: where it is from.
        end_of_turn: id of the token that ends an assistant's answer.

    Raises:
        ConfigError: the template has an error, or answers in its text have no end.
    """

    def __init__(self, source: str, tokenizer: TokenizerSpec, *, origin: str = "one") -> None:
        self.source, self.origin = source, origin
        self._text = special_text(tokenizer)
        self._told = False
        question, answer = _PROBE[:2]
        try:
            self._template = environment().from_string(source)
            # One turn, and no prompt before it: what a template does to earlier turns is none of its end.
            turn = self._answer(self._render([question, answer], False), answer["content"])
        except (jinja2.TemplateError, DataError) as error:
            raise ConfigError(f"--chat-template: {error}") from error
        self.end_of_turn = self._text.encode(turn)[-1]

    def check_tuning(self) -> None:
        """Refuse a template whose prompts at inference could not be those that were tuned on.

        Raises:
            ConfigError: it rewrites earlier turns, or does not tell answers from prompts (see `encode`).
        """
        try:
            self.encode(_PROBE)
        except DataError as error:
            raise ConfigError(f"--chat-template: {error}") from error

    @property
    def is_built_in(self) -> bool:
        """Whether it is neither a file's nor the tokenizer's."""
        return is_built_in(self.source)

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
        wherever turn ``i`` is the assistant's. If a template does not allow for that, a prompt for an answer
        is tokenised in one piece, with a warning, and anything else is refused.

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
        ids: list[int] = []
        mask: list[int] = []
        for text, written in self._texts(messages, add_generation_prompt):
            new = self._text.encode(text)
            ids.extend(new)
            mask.extend([written] * len(new))
        return ids, mask

    def pieces(self, messages: Sequence[Message]) -> list[str]:
        """The texts of which `encode` joins the tokens, for those who have a faster tokenizer.

        Args:
            messages: the turns.

        Returns:
            Texts to be tokenised each by itself, without tokens around it. One that is a key of
            `special_ids` is that token.

        Raises:
            DataError: as `encode`.
        """
        segments = self._segments(messages, False)
        return [piece for text, _ in segments for piece in self._text.split(text) if piece]

    @property
    def special_ids(self) -> Mapping[str, int]:
        """Tokens that the tokenizer does not read from text, by what stands for them in `pieces`."""
        return self._text.special_ids

    def _texts(
        self, messages: Sequence[Message], add_generation_prompt: bool
    ) -> list[tuple[str, int]]:
        """The segments, or the whole of a prompt that has none."""
        try:
            return list(self._segments(messages, add_generation_prompt))
        except DataError:
            if not add_generation_prompt:
                raise
        self._refuse_special(messages)
        whole = self._render(messages, True)
        if not self._told:
            self._told = True
            logger.warning(
                "--chat-template: %s rewrites earlier turns; prompts that it does so in are rendered and "
                "tokenised in one piece, as by other engines",
                self.origin,
            )
        return [(whole, 0)]

    def _segments(
        self, messages: Sequence[Message], add_generation_prompt: bool
    ) -> Iterator[tuple[str, int]]:
        """The texts that are tokenised each by itself, and for each whether the model writes it."""
        self._refuse_special(messages)
        done = ""
        for index, message in enumerate(messages):
            if message["role"] == "assistant":
                prompt = self._render(messages[:index], True)
                yield self._after(done, prompt), 0
                turn = self._after(prompt, self._render(messages[: index + 1], False))
                answer = self._answer(turn, message["content"])
                yield answer, 1
                done = prompt + answer
        yield self._after(done, self._render(messages, add_generation_prompt)), 0

    def _after(self, start: str, text: str) -> str:
        if not text.startswith(start):
            raise DataError(
                "expected a chat template under which each turn only adds to the text before it (the prompt "
                f"at inference must be what was trained on), found {self.origin}, which rewrites earlier "
                "turns; --chat-template FILE names another"
            )
        return text[len(start) :]

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
        if not text and (first := self._text.special.search(turn)):
            return turn[: first.end()]  # an empty text is in every place, also behind that token
        starts = list(_places(text, turn))
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
        ConfigError: the file is missing, or the template cannot be used. Whether it can be tuned on is for
            `ChatTemplate.check_tuning` to say.
    """
    if path is not None:
        file = Path(path) / TEMPLATE_FILE if Path(path).is_dir() else Path(path)
        if not file.is_file():
            raise ConfigError(f"--chat-template: expected a Jinja file, found nothing at {file}")
        return ChatTemplate(file.read_text(encoding="utf-8"), tokenizer, origin=str(file))
    special = special_text(tokenizer)
    if special.template:
        return ChatTemplate(special.template, tokenizer, origin="the tokenizer's own")
    source = BUILT_IN_WITH_BOS if special.begins_with_bos else BUILT_IN
    return ChatTemplate(source, tokenizer, origin="the built-in one")


def is_built_in(source: str) -> bool:
    """Whether a template is the one that tokenizers without their own get."""
    return source in (BUILT_IN, BUILT_IN_WITH_BOS)


def _places(part: str, text: str) -> Iterator[int]:
    """Where a part begins in a text, overlaps included; a pattern would be compiled for each answer."""
    place = text.find(part)
    while place >= 0:
        yield place
        place = text.find(part, place + 1)
