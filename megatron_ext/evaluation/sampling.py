"""From the logits of the next token to that token: greedy or sampled, each request by itself.

Every request has random numbers of its own, so its text does not depend on the batch that it is in, on
the parallel layout, or on whether a run was interrupted.

Shapes: b requests of a batch, V tokens of the vocabulary.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from megatron_ext.exceptions import ConfigError

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens are chosen.

    Attributes:
        max_new_tokens: tokens after the prompt at most.
        temperature: logits are divided by it; 0 takes the most probable token.
        top_p: only the most probable tokens that together have this probability are candidates.
        seed: of the random numbers, together with a request's key.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 1234

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ConfigError(f"--max-new-tokens: expected at least 1, found {self.max_new_tokens}")
        if not 0 <= self.temperature < math.inf:
            raise ConfigError(f"--temperature: expected 0 or more, found {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"--top-p: expected more than 0 and at most 1, found {self.top_p}")


@dataclass(frozen=True, kw_only=True)
class Request:
    """A prompt to be continued.

    Attributes:
        key: names the request; different requests with one seed get different random numbers.
        tokens: ids of the prompt, at least one.
        sampling: how to choose.
        stop: ids that end the text; the one that ended it is its last token.
        ends: whether the new tokens end the text in another way, by a word for example.
    """

    key: str
    tokens: Sequence[int]
    sampling: Sampling
    stop: frozenset[int]
    ends: Callable[[Sequence[int]], bool] | None = None

    def is_finished(self, new: Sequence[int]) -> bool:
        """Whether the last of the new tokens ends the text."""
        return new[-1] in self.stop or (self.ends is not None and self.ends(new))


@dataclass(frozen=True, kw_only=True)
class Scored:
    """Tokens whose probability is asked for.

    Attributes:
        tokens: ids, at least two.
        start: of the first that counts, at least 1; all before it are its context.
    """

    tokens: Sequence[int]
    start: int


def room_for_prompt(tokens: int, *, new: int, context: int) -> int:
    """How many of a prompt's last tokens are read.

    As many as `new` tokens behind them leave of the context, but half of it at least: some tasks ask for more
    new tokens than a small model has positions, and would be answered without their question.

    Args:
        tokens: of the prompt.
        new: the most that are to be made.
        context: positions of the model.
    """
    return max(context - new, min(tokens, context // 2))


class Chooser:
    """Chooses the next token of each request of a batch.

    Args:
        requests: the requests, in the order of the rows.
        vocab_size: tokens that there are; logits beyond them are padding.
    """

    def __init__(self, requests: Sequence[Request], *, vocab_size: int) -> None:
        self._sampling = [request.sampling for request in requests]
        self._streams = [random.Random(f"{r.sampling.seed} {r.key}") for r in requests]
        self._vocab_size = vocab_size

    def __call__(self, logits: Tensor, *, rows: Sequence[int]) -> Tensor:
        """Choose for some of the rows; only theirs of the random numbers are used up.

        Args:
            logits: `[b, V]`, any precision.
            rows: of the requests that want a token.

        Returns:
            int64 `[b]`; where no token was wanted the most probable one.
        """
        logits = logits[:, : self._vocab_size].float()
        chosen = logits.argmax(dim=-1)
        sampled = [row for row in rows if self._sampling[row].temperature > 0]
        if sampled:
            wanted = logits[sampled].double()

            def column(values: Sequence[float]) -> Tensor:
                return wanted.new_tensor(values)[:, None]

            chosen[sampled] = sample(
                wanted,
                temperature=column([self._sampling[row].temperature for row in sampled]),
                top_p=column([self._sampling[row].top_p for row in sampled]),
                uniform=column([self._streams[row].random() for row in sampled]),
            )
        return chosen


def sample(logits: Tensor, *, temperature: Tensor, top_p: Tensor, uniform: Tensor) -> Tensor:
    """Nucleus sampling by inversion of the cumulative distribution.

    Args:
        logits: `[b, V]`, any precision.
        temperature: `[b, 1]`, positive.
        top_p: `[b, 1]`; the token that crosses it is still a candidate.
        uniform: `[b, 1]`, random numbers in `[0, 1)`.

    Returns:
        int64 `[b]`.
    """
    probabilities, order = (logits.double() / temperature).softmax(-1).sort(-1, descending=True)
    before = probabilities.cumsum(-1) - probabilities
    probabilities = probabilities * (before < top_p)
    cumulative = probabilities.cumsum(-1)
    index = (cumulative <= uniform * cumulative[:, -1:]).sum(-1, keepdim=True)
    last = (probabilities > 0).sum(-1, keepdim=True) - 1
    return order.gather(-1, index.minimum(last))[:, 0]
