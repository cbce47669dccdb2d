"""A rank that torchrun starts twice, and what it hears in each start of what rank 0 says in it.

Arguments: the folder of the results, a file a start and rank; `group` for what `first_rank.tell` hears, or
`store` for what a key of torchrun's store holds before rank 0 has written it. A first start ends in an error.
"""

import json
import os
import sys
from argparse import Namespace
from pathlib import Path

import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))


def by_group(rank, start, write):
    """The answer of the product."""
    from megatron_ext.runtime import cpu

    cpu.enable()
    from megatron_ext import first_rank

    dist.init_process_group("gloo")
    write(first_rank.tell(Namespace(rank=rank, world_size=2), lambda: start))
    dist.barrier()  # where one rank ends torchrun ends the other
    dist.destroy_process_group()


def by_store(rank, start, write):
    """The answer that rank 1 finds in the store; rank 0 writes its own when that has been written down."""
    store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
    mine, others = f"rank {rank} in {start}", f"rank {1 - rank} in {start}"
    if rank == 0:
        store.wait([others])
        store.set("answer", str(start))
        store.set(mine, "")
        return
    write(int(store.get("answer")) if store.check(["answer"]) else None)
    store.set(mine, "")
    store.wait([others])


if __name__ == "__main__":
    folder, way = sys.argv[1:]
    rank, start = (int(os.environ[name]) for name in ("RANK", "TORCHELASTIC_RESTART_COUNT"))
    result = Path(folder) / f"{start}.{rank}.json"
    ways = {"group": by_group, "store": by_store}
    ways[way](rank, start, lambda heard: result.write_text(json.dumps(heard)))
    sys.exit(start == 0)
