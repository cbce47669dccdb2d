"""Asking a judge: any OpenAI-compatible endpoint, over the standard library's HTTP.

What a judge says is text to be parsed, never code. A transport that fails is no verdict: it is retried,
and in the end stops the run, which goes on from there when it is started again.
"""

from __future__ import annotations

import http.client
import json
import logging
import os
import random
import threading
import urllib.error
import urllib.request
from argparse import ArgumentParser, Namespace
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from tqdm import tqdm

from megatron_ext.data.chat import Message
from megatron_ext.evaluation.journal import Journal
from megatron_ext.exceptions import ConfigError, DataError, flag_name

logger = logging.getLogger(__name__)

# Time-outs, conflicts, rate limits and faults of the server: another attempt may succeed.
_PASSING = {408, 409, 425, 429, 500, 502, 503, 504, 529}


@dataclass(frozen=True)
class Said:
    """What a judge said.

    Attributes:
        text: its words.
        cut_at: the limit of tokens that ended them, where one did.
    """

    text: str
    cut_at: int | None = None

    @property
    def verdict(self) -> str:
        """What may be parsed: nothing of a text that was cut, for it ends with no conclusion."""
        return self.text if self.cut_at is None else ""


@dataclass(frozen=True, kw_only=True)
class Judge:
    """An endpoint and its model.

    Attributes:
        url: of the API, up to and including its version, such as ``http://localhost:8000/v1``.
        model: its name there.
        api_key: sent as a bearer token if there is one.
        max_tokens: of a verdict.
        timeout: seconds for an attempt.
        attempts: for a verdict.
        wait: seconds before the second attempt; doubled before each further one.
        parallel: requests at a time.
    """

    url: str
    model: str
    api_key: str | None = None
    max_tokens: int = 2048
    timeout: float = 120.0
    attempts: int = 6
    wait: float = 2.0
    parallel: int = 4

    def __post_init__(self) -> None:
        if not self.url.startswith(("http://", "https://")):
            raise ConfigError(f"--judge-url: expected http:// or https://, found {self.url}")
        if self.timeout <= 0:
            raise ConfigError(f"--judge-timeout: expected seconds above 0, found {self.timeout:g}")
        for flag in ("max_tokens", "attempts", "parallel"):
            if getattr(self, flag) < 1:
                raise ConfigError(
                    f"{flag_name(f'judge_{flag}')}: expected at least 1, found {getattr(self, flag)}"
                )

    def ask(
        self,
        messages: Sequence[Message],
        *,
        key: str = "",
        given_up: threading.Event | None = None,
    ) -> Said:
        """The judge's answer at temperature 0.

        Args:
            messages: the prompt.
            key: names the question in errors.
            given_up: once it is set, no further attempt is made.

        Raises:
            ConfigError: the endpoint refuses the request.
            DataError: it cannot be reached, or answers with something else, at every attempt.
        """
        given_up = given_up or threading.Event()
        body = {
            "model": self.model,
            "messages": list(messages),
            "temperature": 0,
            "max_tokens": self.max_tokens,
        }
        problem, wanted = "", f"--judge-url {self.url}: expected a verdict of {self.model}"
        if key:
            wanted += f" on question {key!r}"
        for attempt in range(self.attempts):
            # Spread out, so that requests that failed together do not come back together.
            delay = self.wait * 2 ** (attempt - 1) * random.uniform(0.8, 1.2) if attempt else 0
            if given_up.wait(delay):
                break
            try:
                text, is_cut = _content(self._post(body))
                return Said(text, self.max_tokens if is_cut else None)
            except urllib.error.HTTPError as error:
                problem = f"{error.code} {error.reason}: {_excerpt(error)}"
                if error.code not in _PASSING:
                    raise ConfigError(f"{wanted}, found {problem}") from error
            except (OSError, http.client.HTTPException, _NoVerdictError) as error:
                problem = str(error) or type(error).__name__
            logger.info("judge: attempt %d of %d: %s", attempt + 1, self.attempts, problem)
        raise DataError(
            f"{wanted}, found none in {self.attempts} attempts, the last: {problem}; finished verdicts are "
            "kept, the same command goes on"
        )

    def _post(self, body: Mapping[str, Any]) -> bytes:
        request = urllib.request.Request(
            self.url.rstrip("/") + "/chat/completions",
            data=json.dumps(body).encode(),
            headers={"Content-Type": "application/json"},
        )
        if self.api_key:
            request.add_unredirected_header("Authorization", f"Bearer {self.api_key}")
        with urllib.request.urlopen(request, timeout=self.timeout) as response:
            content: bytes = response.read()
        return content


class _NoVerdictError(Exception):
    """An answer of another form."""


def _content(data: bytes) -> tuple[str, bool]:
    """The text of a chat completion, and whether the limit of tokens ended it."""
    try:
        choice = json.loads(data)["choices"][0]
        content = choice["message"]["content"]
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise _NoVerdictError(f"expected a chat completion, found {data[:200]!r}") from error
    # A refusal has no content; it is a verdict that says nothing. Text that was cut in the middle of a
    # character may end with half of a pair, which no file can hold.
    text = content if isinstance(content, str) else ""
    text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text, choice.get("finish_reason") == "length"


def _excerpt(error: urllib.error.HTTPError) -> str:
    try:
        return error.read(300).decode(errors="replace")
    except OSError:
        return ""


def ask_all(
    judge: Judge, prompts: Mapping[str, Sequence[Message]], *, journal: Journal
) -> dict[str, Said]:
    """Ask for every verdict that the journal does not hold, or holds only as a smaller limit cut it.

    The limit is none of the journal's settings: what it did not cut is the same under any other, and one
    that the judge's context has no room for can be lowered without asking for everything again.

    Args:
        judge: the endpoint.
        prompts: messages by key.
        journal: where verdicts are kept as they come.

    Returns:
        What the judge said by key, in the order of the prompts.
    """
    kept = {key: _said(journal[key]) for key in prompts if key in journal}
    limit = judge.max_tokens
    todo = [key for key in prompts if key not in kept or (kept[key].cut_at or limit) < limit]
    given_up = threading.Event()
    ask = partial(judge.ask, given_up=given_up)
    with journal.filling(prompts), ThreadPoolExecutor(max_workers=judge.parallel) as pool:
        futures = {pool.submit(ask, prompts[key], key=key): key for key in todo}
        try:
            for future in tqdm(
                as_completed(futures), total=len(todo), desc="verdicts", disable=None
            ):
                said = future.result()
                journal.add(futures[future], said.text if said.cut_at is None else asdict(said))
        except BaseException:
            given_up.set()  # the executor waits for those that are on their way
            for future in futures:
                future.cancel()
            raise
    return {key: _said(journal[key]) for key in prompts}


def _said(kept: str | dict[str, Any]) -> Said:
    """What a journal keeps; earlier versions kept texts alone."""
    return Said(kept) if isinstance(kept, str) else Said(**kept)


def add_judge_arguments(parser: ArgumentParser) -> None:
    """Flags that name a judge."""
    group = parser.add_argument_group("judge")
    group.add_argument(
        "--judge-url", help="OpenAI-compatible API, such as http://localhost:8000/v1"
    )
    group.add_argument("--judge-model", help="name of the judge's model")
    group.add_argument(
        "--judge-api-key-variable",
        default="OPENAI_API_KEY",
        metavar="NAME",
        help="environment variable that holds the API key, if one is needed",
    )
    group.add_argument(
        "--judge-max-tokens",
        type=int,
        default=Judge.max_tokens,
        help="per verdict; one that needs more is cut and counts as unparsable",
    )
    group.add_argument(
        "--judge-timeout", type=float, default=Judge.timeout, help="seconds per request"
    )
    group.add_argument("--judge-attempts", type=int, default=Judge.attempts)
    group.add_argument("--judge-parallel", type=int, default=Judge.parallel)


def judge_from(options: Namespace) -> Judge | None:
    """The judge of the command line, if it names one.

    Raises:
        ConfigError: only half of it is named.
    """
    if options.judge_url is None and options.judge_model is None:
        return None
    if options.judge_url is None or options.judge_model is None:
        raise ConfigError("--judge-url and --judge-model: expected both or none, found one")
    return Judge(
        url=options.judge_url,
        model=options.judge_model,
        api_key=os.environ.get(options.judge_api_key_variable),
        max_tokens=options.judge_max_tokens,
        timeout=options.judge_timeout,
        attempts=options.judge_attempts,
        parallel=options.judge_parallel,
    )
