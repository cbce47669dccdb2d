"""The entry point, writing down the samples that it trains on: role and data set, one a line.

The first argument is the folder; each rank has a file of its own there.
"""

import os
import re
import runpy
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))


def main(folder):
    from megatron_ext.runtime import cpu

    cpu.enable()
    import megatron_ext.plain
    import megatron_ext.training
    from megatron_ext.data.batch import read_micro_batch

    Path(folder).mkdir(parents=True, exist_ok=True)
    log = Path(folder) / f"{os.environ.get('RANK', '0')}.txt"

    def recorded(*args, **kwargs):
        batch = read_micro_batch(*args, **kwargs)
        with log.open("a") as stream:
            for source, mask in zip(batch.sources, batch.loss_mask, strict=True):
                role = "forget" if bool((mask < 0).any()) else "learn"
                path = re.fullmatch(r"sample \d+ of (\S+) \(.*", source).group(1)
                stream.write(f"{role} {path}\n")
        return batch

    megatron_ext.plain.read_micro_batch = megatron_ext.training.read_micro_batch = recorded
    runpy.run_path(str(ROOT / "pretrain_unlearn.py"), run_name="__main__")


if __name__ == "__main__":
    main(sys.argv.pop(1))
