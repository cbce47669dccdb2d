"""The entry point with a fault: in step `POISON_STEP` the weights or a gradient turn NaN.

The first argument says which: `token:N` the embedding of token N, `gradient:M` what goes back from
microbatch M (`gradient:M:R` on rank R alone), `lasting:` what goes back from all, from that step on.
"""

import runpy
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
POISON_STEP = 3


def main(poison):
    from megatron_ext.runtime import cpu

    cpu.enable()
    from megatron.core.utils import unwrap_model

    from megatron_ext.training import UnlearnStep

    kind, number, *ranks = poison.split(":")
    forward_step = UnlearnStep.forward_step
    seen = 0

    def poisoned(self, data_iterator, model):
        nonlocal seen
        late = self.args.curr_iteration - (POISON_STEP - 1)
        if late < 0 or (late > 0 and kind != "lasting"):
            return forward_step(self, data_iterator, model)
        core = unwrap_model(model)
        if kind == "token" and core.pre_process:
            core.embedding.word_embeddings.weight.data[int(number)] = float("nan")
        output, loss = forward_step(self, data_iterator, model)
        here = not ranks or self.args.rank == int(ranks[0])
        if kind == "lasting" or (kind == "gradient" and seen == int(number) and here):
            output[0].register_hook(lambda gradient: gradient * float("nan"))  # the loss
        seen += 1
        return output, loss

    UnlearnStep.forward_step = poisoned
    runpy.run_path(str(ROOT / "pretrain_unlearn.py"), run_name="__main__")


if __name__ == "__main__":
    main(sys.argv.pop(1))
