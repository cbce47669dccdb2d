"""From texts and conversations to completions, by whatever generates them."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from tqdm import tqdm

from megatron_ext.data.chat import Message
from megatron_ext.data.chat_template import ChatTemplate, load_template
from megatron_ext.data.tokenizers import (
    SentencePieceReference,
    TokenizerSpec,
    build_reference,
    tokenizer_digest,
)
from megatron_ext.evaluation.declared_stops import declared_stops
from megatron_ext.evaluation.journal import Journal
from megatron_ext.evaluation.sampling import Request, Sampling, Scored
from megatron_ext.exceptions import ConfigError

logger = logging.getLogger(__name__)


class Generator(Protocol):
    """A model that continues prompts.

    Attributes:
        is_writer: whether this process writes what was generated.
        batch_size: requests at a time.
        context_length: tokens of a prompt with its completion at most.
        identity: changes with the weights.
    """

    is_writer: bool
    batch_size: int
    context_length: int
    identity: str

    def agree(self, value: Any) -> Any:
        """The writer's value on every rank."""

    def complete(self, requests: Sequence[Request]) -> list[list[int]]:
        """New tokens of each request, on every rank."""

    def score(self, sequences: Sequence[Scored]) -> list[tuple[float, bool]]:
        """Log-probability of each, and whether it is the most probable text, on every rank."""


@dataclass(frozen=True)
class Completion:
    """What was generated.

    Attributes:
        text: without the token that ended it.
        finish: ``stop``, ``length``, or ``no room``: the prompt fills the context by itself.
        tokens: how many, the one that ended it included.
    """

    text: str
    finish: str
    tokens: int


class Codec:
    """Tokens of prompts and conversations, and text of tokens.

    Args:
        spec: the tokenizer of the model.
        template: chat template: a file, a directory that holds one, or the tokenizer's own.

    Attributes:
        vocab_size: tokens that there are.
        eod: the token that ends a document.
        declared: tokens of the vocabulary that the files beside the tokenizer call ends of a text.

    Raises:
        ConfigError: the tokenizer cannot be used.
    """

    def __init__(self, spec: TokenizerSpec, *, template: str | Path | None = None) -> None:
        self._spec, self._template_path = spec, template
        self._tokenizer = build_reference(spec)
        self.vocab_size = self._tokenizer.vocab_size
        if self._tokenizer.eod_id is None:
            raise ConfigError("--tokenizer-model: expected an end-of-document token, found none")
        self.eod = self._tokenizer.eod_id
        self.declared = frozenset(i for i in declared_stops(spec) if 0 <= i < self.vocab_size)

    @cached_property
    def digest(self) -> str:
        """Changes with the tokenizer's vocabulary."""
        return tokenizer_digest(self._spec)

    @cached_property
    def template(self) -> ChatTemplate:
        """The chat template."""
        template = load_template(self._spec, path=self._template_path)
        if self._template_path is None and template.is_built_in:
            logger.warning(
                "--chat-template: none is given and none is stored with the model; the built-in one is used, "
                "which a model that was not tuned on it does not follow"
            )
        return template

    def prompt(self, key: str, text: str, sampling: Sampling) -> Request:
        """A request to continue a text; an empty one begins a document."""
        tokens = self.encode(text) or [self.eod]
        return Request(key=key, tokens=tokens, sampling=sampling, stop=self.stops(chat=False))

    def chat(self, key: str, messages: Sequence[Message], sampling: Sampling) -> Request:
        """A request for the assistant's next turn."""
        tokens, _ = self.template.encode(messages, add_generation_prompt=True)
        return Request(key=key, tokens=tokens, sampling=sampling, stop=self.stops(chat=True))

    def stops(self, *, chat: bool) -> frozenset[int]:
        """Tokens that end a document, or an answer in a conversation."""
        return self.declared | {self.eod, *([self.template.end_of_turn] if chat else [])}

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """Tokens of a text, as preprocessing makes them, but for what ends a document: a text goes on.

        Args:
            text: the text.
            special: whether a tokenizer that begins documents with a token may do so.
        """
        if not special and not isinstance(self._tokenizer, SentencePieceReference):
            ids: list[int] = self._tokenizer.tokenizer(text, add_special_tokens=False).input_ids
        else:
            ids = self._tokenizer.encode_batch([text])[0].tolist()
            ids = ids[: len(ids) - self._ending]
        return ids

    @cached_property
    def _ending(self) -> int:
        """How many tokens the tokenizer puts behind every text, such as the end of a document."""
        if isinstance(self._tokenizer, SentencePieceReference):
            return 0
        whole = self._tokenizer.encode_batch(["a"])[0].tolist()
        bare = self.encode("a", special=False)
        places = range(len(whole) - len(bare) + 1)
        start = next((i for i in places if whole[i : i + len(bare)] == bare), places[-1])
        return len(whole) - start - len(bare)

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of tokens, control tokens left out."""
        if isinstance(self._tokenizer, SentencePieceReference):
            return str(self._tokenizer.processor.decode(list(tokens)))
        return str(self._tokenizer.tokenizer.decode(list(tokens), skip_special_tokens=True))

    def clean(self, text: str) -> str:
        """A text that may stand in a message: what spells a special token is left out."""
        return self.template.without_special(text)

    def completion(self, request: Request, tokens: Sequence[int]) -> Completion:
        """What the new tokens say."""
        stopped = bool(tokens) and tokens[-1] in request.stop
        text = self.decode(tokens[: len(tokens) - stopped])
        return Completion(text, "stop" if stopped else "length", len(tokens))


def complete_all(
    generator: Generator,
    codec: Codec,
    requests: Sequence[Request],
    *,
    journal: Journal | None,
    title: str,
) -> dict[str, Completion]:
    """Generate for every request that the journal does not hold.

    Args:
        generator: the model; all its ranks call this with the same requests.
        codec: the model's tokenizer.
        requests: with different keys.
        journal: where finished ones are kept, on the writer; ``None`` on other ranks.
        title: of the progress bar.

    Returns:
        Completions by key, on every rank.
    """
    found = {r.key: journal[r.key] for r in requests if journal is not None and r.key in journal}
    done = {key: Completion(**value) for key, value in generator.agree(found).items()}
    todo = [request for request in requests if request.key not in done]
    filling = nullcontext() if journal is None else journal.filling([r.key for r in requests])
    hidden = None if generator.is_writer else True
    with filling, tqdm(total=len(todo), desc=title, disable=hidden) as bar:
        for batch in _batches(todo, generator, done):
            for request, tokens in zip(batch, generator.complete(batch), strict=True):
                done[request.key] = codec.completion(request, tokens)
                if journal is not None:
                    journal.add(request.key, asdict(done[request.key]))
            bar.update(len(batch))
    return done


def _batches(
    requests: Sequence[Request], generator: Generator, done: dict[str, Completion]
) -> Iterator[list[Request]]:
    """Requests of similar length together, the longest first: what does not fit fails at once."""
    room = [r for r in requests if len(r.tokens) < generator.context_length]
    if len(room) < len(requests):
        logger.warning(
            "%d of %d prompts have %d tokens or more, which the model's context cannot hold: their "
            "completions are empty",
            *(len(requests) - len(room), len(requests), generator.context_length),
        )
    for request in requests:
        if len(request.tokens) >= generator.context_length:
            done[request.key] = Completion("", "no room", 0)
    room.sort(key=lambda request: len(request.tokens), reverse=True)
    for start in range(0, len(room), generator.batch_size):
        yield room[start : start + generator.batch_size]
