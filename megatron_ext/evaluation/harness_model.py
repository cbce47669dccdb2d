"""A model of ours as lm-evaluation-harness (0.4) calls one: scores of continuations, and generated text.

Both backends of `open_generator`, so a Megatron checkpoint is evaluated as it is, at any parallel layout;
all ranks run the harness alike and meet in the model.

A chat stays a list of messages inside the text that the harness carries around, between two Unicode
noncharacters, and becomes tokens through `ChatTemplate.encode`: the tokens of tuning, one by one, also
with a SentencePiece tokenizer, which reads no control tokens from text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from megatron_ext.evaluation.completion import Codec, Generator
from megatron_ext.evaluation.sampling import Request, Sampling, Scored, room_for_prompt
from megatron_ext.exceptions import DataError

_CHAT = re.compile("\ufdd4(.*?)\ufdd5", re.DOTALL)
_MAX_NEW_TOKENS = 256
# New tokens that are looked at for a stop word: longer ones of the tasks have some 12 characters.
_WINDOW = 24


class HarnessModel(TemplateLM):
    """Answers the harness's requests.

    Args:
        generator: the model.
        codec: its tokenizer.
        seed: of sampled text, where a task samples.
    """

    def __init__(self, generator: Generator, codec: Codec, *, seed: int = 1234) -> None:
        super().__init__()
        self._generator, self._codec, self._seed = generator, codec, seed
        self.truncated = self.shortened = 0

    @property
    def eot_token_id(self) -> int:
        """The token that ends a document."""
        return self._codec.eod

    @property
    def prefix_token_id(self) -> int:
        """The token before a text without a context: what the tokenizer begins one with, if anything."""
        return next(iter(self._codec.encode("")), self._codec.eod)

    @property
    def tokenizer_name(self) -> str:
        """Part of the name of the harness's cache of requests, which is not used."""
        return self._generator.identity

    def chat_template(self, chat_template: bool | str = False) -> str:
        """What the results record."""
        return self._codec.template.source if chat_template else ""

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """A conversation as text that `tok_encode` knows again.

        The harness asks for no generation prompt where a task begins the answer (``gen_prefix``): the last
        turn, the assistant's, is then to be continued and has no end.
        """
        cleaned = [turn | {"content": self._codec.clean(turn["content"])} for turn in chat_history]
        begun = ""
        if not add_generation_prompt and cleaned and cleaned[-1]["role"] == "assistant":
            begun, add_generation_prompt = cleaned.pop()["content"], True
        return f"\ufdd4{json.dumps([cleaned, add_generation_prompt])}\ufdd5{begun}"

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        """Tokens of a text, or of a conversation with what follows it."""
        found = _CHAT.match(string)
        if found is None:
            return self._codec.encode(string, special=add_special_tokens is not False)
        messages, add_generation_prompt = json.loads(found[1])
        ids, _mask = self._codec.template.encode(
            messages, add_generation_prompt=add_generation_prompt
        )
        rest = string[found.end() :]
        return [*ids, *(self._codec.encode(rest, special=False) if rest else [])]

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[tuple[str, str], list[int], list[int]]],
        disable_tqdm: bool = False,
        **_: Any,
    ) -> list[tuple[float, bool]]:
        scored = []
        for texts, context, continuation in requests:
            if not continuation:  # its probability would be 1, more than that of any other choice
                raise DataError(
                    f"--tasks: expected a token or more for each answer, found none for {texts[1]!r} behind "
                    f"{texts[0][-40:]!r}: the tokenizer makes one token of both"
                )
            tokens = [*(context or [self.prefix_token_id]), *continuation]
            room = self._generator.context_length + 1
            self.truncated += len(tokens) > room
            tokens = tokens[-room:]
            scored.append(Scored(tokens=tokens, start=max(1, len(tokens) - len(continuation))))
        return self._score(scored, disable=disable_tqdm)

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """Log-probability of whole texts, in the harness's windows: the last one reaches back to be full."""
        scored, owners = [], []
        for number, request in enumerate(requests):
            tokens = self.tok_encode(request.args[0])
            if tokens[:1] == [self.prefix_token_id]:
                tokens = tokens[1:]  # it begins the document and is none of its text
            for window in get_rolling_token_windows(
                tokens, self.prefix_token_id, self._generator.context_length, context_len=1
            ):
                context, continuation = make_disjoint_window(window)
                scored.append(Scored(tokens=[*context, *continuation], start=len(context)))
                owners.append(number)
        totals = [0.0] * len(requests)
        for owner, (total, _greedy) in zip(
            owners, self._score(scored, disable=disable_tqdm), strict=True
        ):
            totals[owner] += total
        return totals

    def _score(self, scored: Sequence[Scored], *, disable: bool) -> list[tuple[float, bool]]:
        order = sorted(range(len(scored)), key=lambda i: -len(scored[i].tokens))
        found: list[tuple[float, bool]] = [(0.0, False)] * len(scored)
        with self._bar(len(scored), "scores", disable) as bar:
            for start in range(0, len(order), self._generator.batch_size):
                batch = order[start : start + self._generator.batch_size]
                results = self._generator.score([scored[i] for i in batch])
                for i, result in zip(batch, results, strict=True):
                    found[i] = result
                bar.update(len(batch))
        return found

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Texts up to the first of the stop words that the task names."""
        asked = [self._request(number, *request.args) for number, request in enumerate(requests)]
        order = sorted(range(len(asked)), key=lambda i: -len(asked[i].tokens))
        texts = [""] * len(asked)
        with self._bar(len(asked), "texts", disable_tqdm) as bar:
            for start in range(0, len(order), self._generator.batch_size):
                batch = order[start : start + self._generator.batch_size]
                new = self._generator.complete([asked[i] for i in batch])
                for i, tokens in zip(batch, new, strict=True):
                    text = self._codec.completion(asked[i], tokens).text
                    texts[i] = _cut(text, _stop_words(requests[i].args[1]))
                bar.update(len(batch))
        return texts

    def _request(self, number: int, context: str, settings: dict[str, Any]) -> Request:
        settings = normalize_gen_kwargs(settings, _MAX_NEW_TOKENS)
        words = _stop_words(settings)
        context_length, asked = self._generator.context_length, int(settings["max_gen_toks"])
        tokens = self.tok_encode(context) or [self.prefix_token_id]
        room = room_for_prompt(len(tokens), new=asked, context=context_length)
        limit = min(asked, context_length - room)
        self.truncated += len(tokens) > room
        self.shortened += limit < asked
        sampling = Sampling(
            max_new_tokens=limit,
            temperature=float(settings.get("temperature") or 0.0),
            top_p=float(settings.get("top_p") or 1.0),
            seed=self._seed,
        )
        chat = _CHAT.match(context) is not None

        def ends(new: Sequence[int]) -> bool:
            text = self._codec.decode(new[-_WINDOW:])
            return any(word in text for word in words)

        return Request(
            key=str(number),
            tokens=tokens[-room:],
            sampling=sampling,
            stop=self._codec.stops(chat=chat),
            ends=ends if words else None,
        )

    def _bar(self, total: int, title: str, disable: bool) -> Any:
        return tqdm(total=total, desc=title, disable=disable or not self._generator.is_writer)


def _stop_words(settings: dict[str, Any]) -> list[str]:
    until = settings.get("until") or []
    return [word for word in ([until] if isinstance(until, str) else until) if word]


def _cut(text: str, words: Sequence[str]) -> str:
    for word in words:
        text = text.partition(word)[0]
    return text
