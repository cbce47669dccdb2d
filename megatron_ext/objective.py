"""The unlearning objective of a global batch: sums over tokens, their means, and what is logged.

Source: arXiv 2406.12397. The paper sums over each text; here every term is the mean over its own tokens
of the global batch, so the result does not depend on TP, PP, DP or the micro-batch size: microbatches
and ranks contribute sums, and the counts that divide them are those of the whole batch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from megatron_ext.config import UnlearnConfig
from megatron_ext.losses import FORGET_LOSSES, cross_entropy

TERMS = ("forget loss", "replay loss", "mitigation kl")
PROBABILITY, INCREASE = "forget token probability", "replay increase"
MEANS = (*TERMS, PROBABILITY, "reference replay loss")
_OF_FORGOTTEN = (0, 3)  # the others are means over replayed tokens

# Denominator of a term without tokens: its mean is then 0 instead of 0/0, and adding it to the token
# counts of other batches changes nothing.
_NO_TOKENS = 1e-30


class Objective:
    """The weighted terms of a run.

    Args:
        config: the forgetting loss and the weights.
    """

    width = len(MEANS)  # of the sums
    told: tuple[str, ...] = TERMS  # of a dataset, on the console

    def __init__(self, config: UnlearnConfig) -> None:
        self._forget_loss = FORGET_LOSSES[config.forget_loss]
        self._weights = (config.forget_weight, config.replay_weight, config.mitigation_weight)
        absent = {
            2: not config.needs_reference,
            4: config.max_replay_increase is None,
        }
        self._logged = [i for i in range(len(MEANS)) if not absent.get(i, False)]

    def sums(self, terms: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Sums over the tokens of a microbatch, or of each of its samples.

        Args:
            terms: fp32 ``[2, ..., n]``, target margin and reference KL of each token; ``[3, ..., n]`` with
                the reference's target margin.
            mask: ``[..., n]``, +1 learn, -1 forget, 0 ignore.

        Returns:
            fp64 ``[5, ...]`` in the order of ``MEANS``; differentiable but for the last two, which are logged
            only.
        """
        margin, kl = terms[0], terms[1]
        forget, replay = (-mask).clamp(min=0), mask.clamp(min=0)
        reference_loss = (
            cross_entropy(terms[2].detach()) if len(terms) > 2 else torch.zeros_like(kl)
        )
        return torch.stack(
            (
                (self._forget_loss(margin) * forget).sum(dim=-1),
                (cross_entropy(margin) * replay).sum(dim=-1),
                (kl * replay).sum(dim=-1),
                (torch.sigmoid(margin.detach()) * forget).sum(dim=-1),
                (reference_loss.detach() * replay).sum(dim=-1),
            )
        ).double()

    def loss(self, sums: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """A microbatch's part of the global batch's loss.

        Args:
            sums: fp64 ``[5]``, from :meth:`sums`.
            tokens: fp64 ``[2]``, forgotten and replayed tokens of the whole global batch.

        Returns:
            fp32 scalar; summed over microbatches and ranks it is the loss of the batch.
        """
        means = (sums / _counts(tokens).clamp(min=1)).unbind()
        # Weights as Python numbers: a tensor of them would be a copy to the GPU that waits for it.
        weighted = [weight * mean for weight, mean in zip(self._weights, means[:3], strict=True)]
        return torch.stack(weighted).sum().float()

    def fractions(self, sums: torch.Tensor, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
        """Numerator and denominator of each logged mean, fp32 ``[2]``.

        Args:
            sums: fp64 ``[5]`` of the whole global batch.
            tokens: fp64 ``[2]``, as in :meth:`loss`.
        """
        counts = _counts(tokens).clamp(min=_NO_TOKENS)
        return {MEANS[i]: torch.stack((sums[i], counts[i])).float() for i in self._logged}

    def metrics(self, sums: torch.Tensor, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
        """Everything that is logged of a step, fp32 scalars. Arguments as in :meth:`fractions`."""
        means = sums / _counts(tokens).clamp(min=_NO_TOKENS)
        return self.derive({MEANS[i]: means[i].float() for i in self._logged})

    def of_dataset(self, sums: Sequence[float], tokens: float, forgotten: bool) -> dict[str, float]:
        """What is logged of the samples of one dataset.

        Args:
            sums: their five, from :meth:`sums`.
            tokens: of these samples, those that count.
            forgotten: their role.
        """
        logged = [i for i in self._logged if (i in _OF_FORGOTTEN) == forgotten]
        means = {MEANS[i]: sums[i] / tokens for i in logged}
        if MEANS[4] in means:
            means[INCREASE] = means["replay loss"] - means[MEANS[4]]
        return means

    def derive(self, means: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Add to the means of the terms what is a function of them.

        Args:
            means: the logged ones of ``MEANS``, in nats a token.

        Returns:
            ``unlearn loss``, the means, ``replay perplexity``, and ``replay increase`` where the reference's
            replay loss is among them.
        """
        weighted = zip(self._weights, TERMS, strict=True)
        loss = torch.stack([weight * means[name] for weight, name in weighted if name in means])
        perplexity = torch.exp(means["replay loss"])
        derived = {"unlearn loss": loss.sum(), **means, "replay perplexity": perplexity}
        if MEANS[4] in means:
            derived[INCREASE] = means["replay loss"] - means[MEANS[4]]
        return derived


def _counts(tokens: torch.Tensor) -> torch.Tensor:
    """Tokens of each of ``MEANS``, ``[5]``."""
    # Not by a list of indices, which would be copied to the GPU and waited for.
    forget, replay = tokens.unbind()
    return torch.stack((forget, replay, replay, forget, replay))
