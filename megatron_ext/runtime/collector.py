"""Python's garbage collector while a program imports torch and Megatron.

They make a million objects that live until the end, and the collector looks through all of them again and
again for cycles: a quarter of the time of a start. Frozen, it never looks at them again, not while training
either.
"""

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def paused() -> Iterator[None]:
    """Collect nothing meanwhile, and leave alone for good what is there if modules were imported.

    If none were, this is not the start of a program, and what is there may have to be collected.
    """
    before = len(sys.modules)
    gc.disable()
    try:
        yield
    finally:
        if len(sys.modules) > before:
            gc.freeze()
        gc.enable()
