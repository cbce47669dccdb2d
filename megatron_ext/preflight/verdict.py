"""From what the ranks found to a table of pass, warn and fail, with the nodes named."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

PASS, WARN, FAIL = "pass", "warn", "FAIL"

# torchrun takes a node for dead whose heartbeat is 15 s old by the clock of another.
_CLOCK_WARN, _CLOCK_FAIL = 1.0, 5.0
# Of a GPU's memory before the run: what its driver keeps is below 1 GiB.
_MEMORY_IN_USE = 1 << 30


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        check: what was looked at.
        status: `pass`, `warn` or `FAIL`.
        nodes: those that the detail is about; empty for all.
        detail: what was found.
    """

    check: str
    status: str
    nodes: tuple[str, ...]
    detail: str


def format_table(rows: Sequence[Row]) -> str:
    """The rows below each other, and a last line that counts them."""
    cells = [(row.check, row.status, ", ".join(row.nodes) or "all", row.detail) for row in rows]
    cells.insert(0, ("check", "result", "nodes", "found"))
    widths = [max(len(row[column]) for row in cells) for column in range(3)]
    lines = [
        f"{check:{widths[0]}}  {status:{widths[1]}}  {nodes:{widths[2]}}  {detail}"
        for check, status, nodes, detail in cells
    ]
    counts = Counter(row.status for row in rows)
    lines.append(", ".join(f"{counts[status]} {status}" for status in (PASS, WARN, FAIL)))
    return "\n".join(lines)


def errors(check: str, nodes: Sequence[str], answers: Sequence[Mapping[str, Any]]) -> list[Row]:
    """A failure for each error, with all nodes that have it."""
    found: dict[str, dict[str, None]] = {}
    for node, answer in zip(nodes, answers, strict=True):
        if "error" in answer:
            found.setdefault(answer["error"], {})[node] = None
    return [Row(check, FAIL, tuple(names), error) for error, names in found.items()]


def _equal(
    check: str, nodes: Sequence[str], values: Sequence[Any], show: Callable[[Any], str]
) -> Row:
    """Passes if all values are equal; else the rarer ones fail."""
    usual, _ = Counter(values).most_common(1)[0]
    odd = {node: value for node, value in zip(nodes, values, strict=True) if value != usual}
    if not odd:
        return Row(check, PASS, (), show(usual))
    found = ", ".join(dict.fromkeys(show(value) for value in odd.values()))
    return Row(check, FAIL, tuple(odd), f"expected {show(usual)} as elsewhere, found {found}")


def versions(nodes: Sequence[str], answers: Sequence[Mapping[str, str]]) -> list[Row]:
    """One row if all is equal, else one for each version that is not; the checkout apart."""
    checkouts = [f"{answer['commit']}, content {answer['checkout']}" for answer in answers]
    names = [name for name in answers[0] if name not in ("commit", "checkout")]
    rows = [_equal(name, nodes, [answer[name] for answer in answers], str) for name in names]
    odd = [row for row in rows if row.status == FAIL]
    text = ", ".join(f"{name} {value}" for name, value in answers[0].items() if name in names)
    equal = [Row("versions", PASS, (), text)]
    return (odd or equal) + [_equal("checkout", nodes, checkouts, str)]


def gpus(
    nodes: Sequence[str], answers: Sequence[Mapping[str, Any]], drivers: Mapping[str, list[dict]]
) -> list[Row]:
    """Each rank has one, all alike and empty, without memory errors."""
    rows = errors("GPU", nodes, answers)
    good = [(n, a) for n, a in zip(nodes, answers, strict=True) if "error" not in a]
    if not good:
        return rows
    kinds = [
        f"{a['devices']} x {a['name']}, {a['total'] / 2**30:.0f} GiB" if a["devices"] else "none"
        for _, a in good
    ]
    rows.append(_equal("GPU", [node for node, _ in good], kinds, str))
    # As by a torch for CPUs alone: the run would begin on the nodes' processors.
    blind = tuple(dict.fromkeys(n for n, a in good if not a["devices"] and drivers.get(n)))
    if blind:
        rows.append(Row("GPU", FAIL, blind, "there is an nvidia-smi, but torch sees no GPU"))
    used = {n: a["total"] - a["free"] for n, a in good if a["devices"]}
    full = {n: size for n, size in used.items() if size > _MEMORY_IN_USE}
    if full:
        sizes = f"up to {max(full.values()) / 2**30:.1f} GiB in use before the run"
        rows.append(Row("GPU memory", WARN, tuple(full), sizes))
    return rows + _drivers(drivers) if used else rows


def _drivers(drivers: Mapping[str, list[dict]]) -> list[Row]:
    rows = []
    silent = tuple(node for node, found in drivers.items() if not found)
    if silent:
        rows.append(Row("driver", WARN, silent, "no nvidia-smi: driver and memory errors unknown"))
    asked = {node: found for node, found in drivers.items() if found}
    firsts = [found[0] for found in asked.values()]
    rows += errors("driver", list(asked), firsts)
    good = {node: found for node, found in asked.items() if "error" not in found[0]}
    if good:
        versions = [found[0]["driver_version"] for found in good.values()]
        rows.append(_equal("driver", list(good), versions, str))
    for node, found in good.items():
        for gpu in found:
            count = gpu["ecc.errors.uncorrected.volatile.total"]
            if count.isdecimal() and int(count):
                detail = (
                    f"GPU {gpu['index']}: {count} uncorrected memory errors since its last reset"
                )
                rows.append(Row("GPU memory", FAIL, (node,), detail))
    return rows


def shared(
    nodes: Sequence[str],
    written: Mapping[str, Any],
    answers: Sequence[Mapping[str, Any]],
    *,
    needed: int,
) -> list[Row]:
    """Every node reads what rank 0 wrote, and there is room.

    Args:
        nodes: those that read.
        written: what `files.write_probe` returned.
        answers: what `files.read_probe` returned.
        needed: bytes that must be free.
    """
    if "error" in written:
        return [Row("shared folder", FAIL, (nodes[0],), written["error"])]
    rows = errors("shared folder", nodes, answers)
    good = [answer for answer in answers if "error" not in answer]
    if not rows:
        waited = max(answer["waited"] for answer in good)
        speed = f"written at {written['speed'] / 1e6:.0f} MB/s"
        late = f"; visible after up to {waited:.1f} s" if waited > 1 else ""
        made = "; was not there, and was made" if written.get("made") else ""
        rows.append(Row("shared folder", PASS, (), f"the same bytes on all; {speed}{late}{made}"))
    free = min((answer["free"] for answer in good), default=0)
    enough = free >= needed
    text = f"{free / 2**30:.1f} GiB" + ("" if enough else f"; expected {needed / 2**30:.1f} GiB")
    return [*rows, Row("free space", PASS if enough else FAIL, (), text)]


def data(nodes: Sequence[str], answers: Sequence[Mapping[str, Any]]) -> list[Row]:
    """The same data sets and tokenizer on all nodes.

    Args:
        nodes: those that looked.
        answers: what `files.all_datasets` returned.
    """
    rows = []
    tokenizers = [answer["tokenizer"] for answer in answers]
    if any(tokenizers):
        rows += errors("tokenizer", nodes, tokenizers) or [
            _equal(
                *(
                    "tokenizer",
                    nodes,
                    [(found["vocab_size"], found["digest"]) for found in tokenizers],
                ),
                lambda found: f"{found[0]} pieces, SHA-256 {found[1][:12]}...",
            )
        ]
    for prefix in answers[0]["data"]:
        sets = [answer["data"][prefix] for answer in answers]
        bad = errors("data", nodes, sets)
        if bad:
            rows += bad
            continue
        row = _equal(
            *("data", nodes, [(found["tokens"], found["digest"]) for found in sets]),
            lambda found, of=prefix: f"{of}: {found[0]:,} tokens, digest {found[1]}",  # type: ignore[misc]
        )
        rows.append(row)
        if row.status == PASS and not sets[0]["manifest"]:
            rows.append(Row("data", WARN, (), f"{prefix}: no manifest: its tokenizer is unknown"))
    return rows


def inputs(nodes: Sequence[str], answers: Sequence[Mapping[str, Any]]) -> list[Row]:
    """The same checkpoints and files on all nodes.

    Args:
        nodes: those that looked.
        answers: what `files.read_input` returned, by path.
    """
    rows = []
    for path in answers[0]:
        found = [answer[path] for answer in answers]
        texts = [f"{path}: {one.get('found')}" for one in found]
        rows += errors("input", nodes, found) or [_equal("input", nodes, texts, str)]
    return rows


def clock(nodes: Sequence[str], times: Sequence[float]) -> list[Row]:
    """Clocks, read when all ranks were let go at once.

    Args:
        nodes: those whose clocks were read.
        times: seconds since the epoch.
    """
    # Of two nobody can say which is right.
    usual = statistics.median_low(times) if len(times) > 2 else times[0]
    skew = {node: time - usual for node, time in zip(nodes, times, strict=True)}
    largest = max(abs(value) for value in skew.values())
    if largest < _CLOCK_WARN:
        return [Row("clock", PASS, (), f"within {largest:.2f} s of each other")]
    return [
        Row("clock", FAIL if abs(value) >= _CLOCK_FAIL else WARN, (node,), f"{value:+.1f} s off")
        for node, value in skew.items()
        if abs(value) >= _CLOCK_WARN
    ]
