"""The entry point with a fault: one weight of the reference changes while it is used."""

import runpy
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

if __name__ == "__main__":
    from megatron_ext.runtime import cpu

    cpu.enable()
    from megatron_ext.reference import FrozenReference

    hidden_states = FrozenReference.hidden_states

    def change_and_run(self, *args, **kwargs):
        parameter = next(self.chunks[0].parameters())
        parameter.data[0, 0] += 2.0**-20
        return hidden_states(self, *args, **kwargs)

    FrozenReference.hidden_states = change_and_run
    runpy.run_path(str(ROOT / "pretrain_unlearn.py"), run_name="__main__")
