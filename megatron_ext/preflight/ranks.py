"""The ranks of a preflight: who they are, and how they tell each other without hanging."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from torch.distributed import DistError, Store, TCPStore

from megatron_ext import launched
from megatron_ext.exceptions import ConfigError, MegatronExtError


class MissingRanksError(MegatronExtError):
    """Ranks that did not come to a point of the preflight in time."""


@dataclass(frozen=True)
class Ranks:
    """This rank among all.

    Attributes:
        store: where ranks leave what the others read.
        rank: global.
        world: ranks in all.
        local_rank: on its node; rank 0 of each node answers for the node.
        node: its node's name.
        timeout: seconds that ranks wait for each other.
    """

    store: Store
    rank: int
    world: int
    local_rank: int
    node: str
    timeout: float

    @property
    def leads_node(self) -> bool:
        """Whether this rank answers for its node."""
        return self.local_rank == 0

    def gather(self, name: str, value: object) -> list[Any]:
        """Bring a value of each rank to rank 0; no rank goes on before all have come.

        Args:
            name: of the point; each is passed once.
            value: to be written as JSON.

        Returns:
            The values in the order of the ranks on rank 0, an empty list on the others.

        Raises:
            MissingRanksError: on all ranks that came, if others did not within the timeout.
        """
        keys = [f"preflight/{name}/{rank}" for rank in range(self.world)]
        seen = f"preflight/{name}/missing"
        self.store.set(keys[self.rank], json.dumps(value))
        if self.rank:
            # Rank 0 may have begun to wait as much later as it lets others be late.
            if not self._wait([seen], 2 * self.timeout):
                raise MissingRanksError(
                    f"{name}: rank 0 did not answer within {2 * self.timeout:g} s"
                )
            missing = json.loads(self.store.get(seen))
        else:
            arrived = self._wait(keys, self.timeout)
            missing = (
                [] if arrived else [r for r, k in enumerate(keys) if not self.store.check([k])]
            )
            self.store.set(seen, json.dumps(missing))
        if missing:
            raise MissingRanksError(
                f"{name}: {_listed(missing)} of {self.world} did not arrive within {self.timeout:g} s"
            )
        return [] if self.rank else [json.loads(value) for value in self.store.multi_get(keys)]

    def tell(self, name: str, value: object) -> Any:
        """Give the value of rank 0 to all; call it behind a `gather`.

        Raises:
            MissingRanksError: rank 0 did not tell in time.
        """
        key = f"preflight/{name}"
        if not self.rank:
            self.store.set(key, json.dumps(value))
        elif not self._wait([key], self.timeout):
            raise MissingRanksError(f"{name}: rank 0 did not answer within {self.timeout:g} s")
        return json.loads(self.store.get(key))

    def leave(self) -> None:
        """Keep rank 0, which may hold the store, until the others have read it; the last call."""
        keys = [f"preflight/left/{rank}" for rank in range(1, self.world)]
        if self.rank:
            self.store.set(keys[self.rank - 1], "")
        elif keys:
            self._wait(keys, min(5.0, self.timeout))

    def _wait(self, keys: list[str], seconds: float) -> bool:
        try:
            self.store.wait(keys, timedelta(seconds=seconds))
        except DistError:
            return False
        return True


def _listed(ranks: list[int]) -> str:
    """`rank 3`, `ranks 3, 8-15`."""
    parts: list[list[int]] = []
    for rank in ranks:
        if parts and rank == parts[-1][-1] + 1:
            parts[-1].append(rank)
        else:
            parts.append([rank])
    texts = [str(part[0]) if len(part) == 1 else f"{part[0]}-{part[-1]}" for part in parts]
    return f"{'rank' if len(ranks) == 1 else 'ranks'} {', '.join(texts)}"


def connect(environment: Mapping[str, str], *, timeout: float) -> Ranks:
    """Join the ranks that torchrun, or srun with one task a GPU, has started.

    Args:
        environment: torchrun's RANK, WORLD_SIZE and LOCAL_RANK or Slurm's numbers, and MASTER_ADDR and
            MASTER_PORT.
        timeout: seconds to wait for rank 0's store, and at each point of the preflight.

    Raises:
        ConfigError: a variable is missing.
        MissingRanksError: nobody answers at the address.
    """
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    found = launched.variables(environment)
    if absent := [name for name in names if name not in found]:
        raise ConfigError(f"{', '.join(absent)}: {launched.EXPECTED}, found no such variable")
    rank, world, local = (int(found[name]) for name in names[:3])
    address, port = (found[name] for name in names[3:])
    hosts = rank == 0 and environment.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    limit = timedelta(seconds=timeout)
    begin = time.monotonic()
    try:
        store = TCPStore(
            address, int(port), world, is_master=hosts, timeout=limit, wait_for_workers=False
        )
    except (DistError, RuntimeError) as error:
        raise MissingRanksError(
            f"{address}:{port}: expected the store of rank 0, found nothing within "
            f"{time.monotonic() - begin:.0f} s"
        ) from error
    node = environment.get("SLURMD_NODENAME") or socket.gethostname()
    return Ranks(store, rank, world, local, node, timeout)
