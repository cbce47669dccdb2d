"""Embeddings of a set by the product's session, as an array, at any layout.

Arguments: OUTPUT.npy PREFIX OPTIONS.json
"""

import json
import sys
from argparse import Namespace

import numpy as np

from megatron_ext.runtime import compat, cpu


def main() -> None:
    output, prefix, options = sys.argv[1:]
    cpu.enable()
    from megatron_ext.analysis.measure import Analysis
    from megatron_ext.checkpoint.named import open_named
    from megatron_ext.session import open_session

    compat.apply()
    settings = Namespace(**json.loads(options))
    first = open_named(settings.checkpoint[0], flag="--checkpoint")
    with open_session(settings, first) as session:
        _, found = Analysis(session, settings).embeddings(settings.checkpoint[0], {"x": prefix})
        if session.is_writer:
            np.save(output, found["x"])


if __name__ == "__main__":
    main()
