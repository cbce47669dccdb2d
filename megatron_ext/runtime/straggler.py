"""What ``--log-straggler`` times: reading and the model's forward passes, as in Megatron's own example."""

from __future__ import annotations

import contextlib
from argparse import Namespace


def watched(args: Namespace, *, reading: bool = False) -> contextlib.AbstractContextManager[object]:
    """Times what is done in this context, where the run asks for it.

    Megatron's detector divides by the time of the forward passes, and prints the traceback of an error that
    passes through it, even where it is switched off.

    Args:
        args: Megatron's validated arguments.
        reading: whether data are read; otherwise a microbatch goes through the model.
    """
    if not args.log_straggler:
        return contextlib.nullcontext()
    import megatron.training.training as loop

    timed: contextlib.AbstractContextManager[object] = loop.stimer(bdata=reading)
    return timed
