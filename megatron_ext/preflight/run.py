"""The preflight from its first question to its table; every rank calls it."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_ext import gpus
from megatron_ext.data.tokenizers import TokenizerSpec
from megatron_ext.preflight import bandwidth, facts, files, network, verdict
from megatron_ext.preflight.ranks import MissingRanksError, Ranks
from megatron_ext.preflight.verdict import FAIL, Row

# Bytes of a message that is long enough for a link to show its bandwidth.
_FAST = 16 << 20


@dataclass(frozen=True, kw_only=True)
class Options:
    """What to look at.

    Attributes:
        shared: a folder that all nodes must see; None leaves it out.
        probe_bytes: size of the file that is written there.
        checkpoint_bytes: that must be free there.
        data: prefixes of data sets.
        inputs: folders of checkpoints, and files, that the run reads.
        tokenizer: that they must have been made with.
        message_bytes: sizes of the all-reduces, ascending; None chooses them.
        least_bandwidth: bus bandwidth that the last of them must reach, in bytes a second.
    """

    shared: Path | None = None
    probe_bytes: int = 64 << 20
    checkpoint_bytes: int = 0
    data: Sequence[str] = ()
    inputs: Sequence[str] = ()
    tokenizer: TokenizerSpec | None = None
    message_bytes: Sequence[int] | None = None
    least_bandwidth: float | None = None


def run(ranks: Ranks, options: Options) -> list[Row]:
    """Ask everything of all ranks.

    Returns:
        The table on rank 0; on the others what kept this rank from the end, or nothing. Ranks that do not
        arrive end it: what was found before stands, and a failure names them.
    """
    rows: list[Row] = []
    try:
        nodes = ranks.gather("start", ranks.node)
        if nodes:
            count = len(set(nodes))
            rows.append(Row("ranks", verdict.PASS, (), f"{ranks.world}, nodes: {count}"))
        _clock(ranks, nodes, rows)
        devices = _machine(ranks, nodes, rows)
        _network(ranks, options, nodes, devices, rows)
        _files(ranks, options, nodes, rows)
    except MissingRanksError as error:
        rows.append(Row("ranks", FAIL, (), str(error)))
    ranks.leave()
    return rows


def _leaders(nodes: Sequence[str], answers: Sequence) -> tuple[list[str], list]:
    """Nodes and their answers, of the ranks that answer for a node."""
    chosen = [(n, a) for n, a in zip(nodes, answers, strict=True) if a is not None]
    return [node for node, _ in chosen], [answer for _, answer in chosen]


def _clock(ranks: Ranks, nodes: Sequence[str], rows: list[Row]) -> None:
    """All were let go by the gather before this at once, up to the network's latency."""
    now = time.time() if ranks.leads_node else None
    if times := ranks.gather("clock", now):
        rows += verdict.clock(*_leaders(nodes, times))


def _machine(ranks: Ranks, nodes: Sequence[str], rows: list[Row]) -> list[dict[str, Any]]:
    """On rank 0 the GPU of each rank."""
    gpu = facts.gpu(ranks.local_rank)
    answer = {"versions": facts.versions(), "driver": facts.driver()} if ranks.leads_node else None
    devices = ranks.gather("gpu", gpu)
    if answers := ranks.gather("versions", answer):
        names, found = _leaders(nodes, answers)
        rows += verdict.versions(names, [one["versions"] for one in found])
        drivers = {name: one["driver"] for name, one in zip(names, found, strict=True)}
        rows += verdict.gpus(nodes, devices, drivers)
    return devices


def _network(
    ranks: Ranks,
    options: Options,
    nodes: Sequence[str],
    devices: Sequence[Mapping[str, Any]],
    rows: list[Row],
) -> None:
    # Where a rank has no GPU, or another than the rest, the others would wait for it in vain.
    fit = all(row.status != FAIL for row in rows if row.check == "GPU")
    per_node = network.ranks_of_a_node(nodes) if nodes else 0
    told = ranks.tell("fit", {"fit": fit, "per_node": per_node})
    if not told["fit"]:
        rows += [Row("all-reduce", verdict.WARN, (), "left out: GPUs differ")] if nodes else []
        return
    sizes = options.message_bytes
    if sizes is None:
        sizes = (1 << 20, 16 << 20, 256 << 20) if torch.cuda.is_available() else (1 << 16, 4 << 20)
    link_bytes = min(sizes[-1], _FAST)
    measured = network.measure(ranks, sizes=sizes, link_bytes=link_bytes, per_node=told["per_node"])
    if answers := ranks.gather("network", measured):
        gpu = gpus.of_device(devices[0].get("name", ""))
        promised = gpu.network if gpu is not None and sizes[-1] >= _FAST else None
        rows += bandwidth.network(nodes, answers, least=options.least_bandwidth, promised=promised)


def _files(ranks: Ranks, options: Options, nodes: Sequence[str], rows: list[Row]) -> None:
    if options.shared is not None:
        probe = files.write_probe(options.shared, options.probe_bytes) if ranks.rank == 0 else None
        try:
            ranks.gather("written", None)
            probe = ranks.tell("probe", probe)
            read = None
            if ranks.leads_node and "error" not in probe:
                read = files.read_probe(probe, patience=ranks.timeout / 2)
            if answers := ranks.gather("read", read):
                names, found = _leaders(nodes, answers)
                needed = options.checkpoint_bytes
                rows += verdict.shared(names or nodes[:1], probe, found, needed=needed)
        finally:
            if ranks.rank == 0 and probe is not None and "file" in probe:
                Path(probe["file"]).unlink(missing_ok=True)
    look = files.all_datasets(options.data, options.tokenizer) if ranks.leads_node else None
    if answers := ranks.gather("data", look):
        rows += verdict.data(*_leaders(nodes, answers))
    seen = {path: files.read_input(path) for path in options.inputs} if ranks.leads_node else None
    if answers := ranks.gather("inputs", seen):
        rows += verdict.inputs(*_leaders(nodes, answers))
