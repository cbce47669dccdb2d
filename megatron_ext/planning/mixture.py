"""The layers of a model that are mixtures of experts: their parameters, FLOPs, and what they keep.

A mixture has a router, E experts, of which each token has k, and possibly shared experts that every token
has (arXiv 2101.03961, 2401.06066). Everything here assumes that experts get equal shares of the tokens;
without a limit to what one may get (the plan refuses such limits) a rank whose experts are the favourites
has as much more rows as they have more tokens.

Symbols as in `architecture`; m width of an expert.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron_ext.planning.split import Split, Tensor

Dispatcher = Literal["allgather", "alltoall"]


@dataclass(frozen=True, kw_only=True)
class Mixture:
    """Sizes of the layers that are mixtures of experts.

    Attributes:
        layers: of each layer of the model, whether it is one.
        experts: E, experts of a layer that tokens are routed to.
        topk: k, experts of a token.
        ffn: m, width of an expert, of each of its two halves.
        shared: width of the shared experts, all together; 0 without.
        gate: whether a gate weighs the shared experts' output.
        grouped: whether a rank's experts are one module of Transformer Engine, for one product; that changes
            the order of their parameters.
        dispatcher: how tokens get to the ranks of their experts.
    """

    layers: tuple[bool, ...]
    experts: int
    topk: int
    ffn: int
    shared: int = 0
    gate: bool = False
    grouped: bool = False
    dispatcher: Dispatcher = "allgather"

    def tensors(self, hidden: int, split: Split) -> list[Tensor]:
        """Parameters of a layer on one GPU, in the order of Megatron's `named_parameters`.

        The router is on every rank. Experts have data-parallel ranks of their own where they are spread
        otherwise than the rest.
        """
        apart = split.ep > 1 or split.etp != split.tp
        own, width = self.experts // split.ep, self.ffn // split.etp
        both = Tensor(2 * width * hidden, expert=apart), Tensor(width * hidden, expert=apart)
        experts = [both[0]] * own + [both[1]] * own if self.grouped else [*both] * own
        found = [Tensor(self.experts * hidden), *experts]
        if self.shared:
            gate = [Tensor(hidden)] if self.gate else []
            shared = self.shared // split.tp * hidden
            found += [*gate, Tensor(2 * shared), Tensor(shared)]
        return found

    @property
    def active(self) -> int:
        """Width that a token passes through: of its experts and the shared ones."""
        return self.topk * self.ffn + self.shared
