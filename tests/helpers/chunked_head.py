"""The entry point where no logits fit: the head takes its gradients chunk by chunk, and says so."""

import runpy
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))


def main():
    from megatron_ext.runtime import cpu

    cpu.enable()
    from megatron_ext import head_chunks
    from megatron_ext.losses import head_loss

    head_chunks.CPU_BUDGET = head_chunks.CPU_CHUNK = 0
    choose, said = head_loss.training_chunk, set()

    def spoken(tokens, *sizes, **options):
        chunk = choose(tokens, *sizes, **options)
        if (tokens, chunk) not in said:
            said.add((tokens, chunk))
            print(f"head: chunks of {chunk} of {tokens} tokens", flush=True)
        return chunk

    head_loss.training_chunk = spoken
    runpy.run_path(str(ROOT / "pretrain_unlearn.py"), run_name="__main__")


if __name__ == "__main__":
    main()
