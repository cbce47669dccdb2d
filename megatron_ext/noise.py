"""Noise that the student computes with and the reference without."""

from __future__ import annotations

import logging
from argparse import Namespace

from megatron_ext.config import UnlearnConfig
from megatron_ext.exceptions import flag_name

logger = logging.getLogger(__name__)


def warn_of_noise(args: Namespace, config: UnlearnConfig) -> None:
    """Say that the KL to a reference also measures dropout, and what is added to the routers' input.

    Megatron's default of 0.1 is of another time, and is taken where the flags of dropout are left out.

    Args:
        args: Megatron's validated arguments.
        config: the settings of unlearning.
    """
    rates = {name: getattr(args, name) for name in ("hidden_dropout", "attention_dropout")}
    if args.num_experts and args.moe_input_jitter_eps:
        rates["moe_input_jitter_eps"] = args.moe_input_jitter_eps
    if not config.needs_reference or not any(rates.values()) or args.rank != 0:
        return
    found = ", ".join(f"{flag_name(name)} {rate:g}" for name, rate in rates.items() if rate)
    logger.warning(
        "%s: the reference computes without this noise, so the KL also measures it; set dropout to 0 for a "
        "model that was trained without, and leave the jitter out",
        found,
    )
