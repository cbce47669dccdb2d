"""Generation by a Hugging Face model in one process, through `generate` of `transformers`."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    LogitsProcessor,
    StoppingCriteria,
)

from megatron_ext.checkpoint.own_tokenizer import CONFIG
from megatron_ext.evaluation.sampling import Chooser, Request, Scored
from megatron_ext.evaluation.scoring import label_scores, rows_to_score, sum_scores
from megatron_ext.exceptions import CheckpointError


class HuggingFaceGenerator:
    """Continues prompts with an exported model.

    Tokens are chosen as `MegatronGenerator` chooses them, so the same seed gives the same text.

    Args:
        folder: the model.
        batch_size: prompts at a time.
        vocab_size: tokens of the tokenizer; the model may have more rows.

    Raises:
        CheckpointError: the folder holds no model that `transformers` loads.
    """

    is_writer = True

    def __init__(self, folder: Path, *, batch_size: int, vocab_size: int) -> None:
        if not (folder / CONFIG).is_file():
            raise CheckpointError(f"expected a Hugging Face model, found no {folder / CONFIG}")
        device = "cuda" if torch.cuda.is_available() else "cpu"
        try:
            model: Any = AutoModelForCausalLM.from_pretrained(
                folder, dtype="auto", local_files_only=True
            )
        except Exception as error:  # whatever transformers raises, the user needs the folder
            raise CheckpointError(f"{folder} cannot be loaded: {error}") from error
        self._model = model.to(device).eval()
        # `generate` takes what a request leaves open from the model's generation_config.json: a penalty on
        # repetition, say, would change the logits here and not under the other backend.
        self._model.generation_config = GenerationConfig()
        self._vocab_size = vocab_size
        self.batch_size = batch_size
        self.identity = _identity(folder)
        self.context_length: int = self._model.config.max_position_embeddings

    def agree(self, value: Any) -> Any:
        """The value itself: there is one process."""
        return value

    @torch.no_grad()
    def complete(self, requests: Sequence[Request]) -> list[list[int]]:
        """Continue up to `batch_size` prompts.

        Args:
            requests: prompts that leave room for a token in `context_length`.

        Returns:
            The new tokens of each.
        """
        width = max(len(request.tokens) for request in requests)
        tokens = torch.zeros(len(requests), width, dtype=torch.int64)
        mask = torch.zeros_like(tokens)
        limits = []
        for row, request in enumerate(requests):
            length = len(request.tokens)
            tokens[row, width - length :] = torch.tensor(request.tokens)
            mask[row, width - length :] = 1
            limits.append(min(request.sampling.max_new_tokens, self.context_length - length))
        stops = frozenset.intersection(*(request.stop for request in requests))
        config = GenerationConfig(
            max_new_tokens=max(limits),
            do_sample=False,  # `_Choice` has chosen
            eos_token_id=sorted(stops) or None,
            pad_token_id=min(stops, default=0),
        )
        output = self._model.generate(
            input_ids=tokens.to(self._model.device),
            attention_mask=mask.to(self._model.device),
            generation_config=config,
            logits_processor=[_Choice(requests, vocab_size=self._vocab_size)],
            stopping_criteria=[_Ends(requests, prompt=width)],
        )
        return [
            _until_finished(new[:limit], request)
            for new, limit, request in zip(
                output[:, width:].tolist(), limits, requests, strict=True
            )
        ]

    @torch.no_grad()
    def score(self, sequences: Sequence[Scored]) -> list[tuple[float, bool]]:
        """Log-probabilities of up to `batch_size` sequences.

        Args:
            sequences: of at most `context_length` + 1 tokens.

        Returns:
            For each the sum over its tokens from `start` on, in nats, and whether each of them is the most
            probable one.
        """
        tokens, counts = rows_to_score(sequences, rows=len(sequences))
        tokens = tokens.to(self._model.device)
        logits = self._model(tokens[:, :-1]).logits[..., : self._vocab_size]
        return sum_scores(label_scores(logits, tokens[:, 1:]).cpu(), counts)


class _Choice(LogitsProcessor):
    """Leaves `generate` no token but the one that `Chooser` chose."""

    def __init__(self, requests: Sequence[Request], *, vocab_size: int) -> None:
        self._choose = Chooser(requests, vocab_size=vocab_size)
        self._rows = range(len(requests))

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        chosen = self._choose(scores, rows=self._rows)
        return torch.full_like(scores, -torch.inf).scatter(1, chosen[:, None], 0.0)


class _Ends(StoppingCriteria):
    """Ends rows whose request says so."""

    def __init__(self, requests: Sequence[Request], *, prompt: int) -> None:
        self._requests, self._prompt = requests, prompt

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        new = input_ids[:, self._prompt :].tolist()
        done = [request.is_finished(row) for request, row in zip(self._requests, new, strict=True)]
        return torch.tensor(done, device=input_ids.device)


def _identity(folder: Path) -> str:
    """Names, sizes and times of the weights: enough to tell that they were replaced."""
    facts = [(file.name, file.stat()) for file in sorted(folder.glob("*.safetensors"))]
    text = repr([(name, stat.st_size, stat.st_mtime_ns) for name, stat in facts])
    return hashlib.sha256(text.encode()).hexdigest()


def _until_finished(tokens: list[int], request: Request) -> list[int]:
    """Tokens up to the one that ends the text; `generate` fills rows that ended early."""
    ends = (i for i in range(1, len(tokens) + 1) if request.is_finished(tokens[:i]))
    return tokens[: next(ends, len(tokens))]
