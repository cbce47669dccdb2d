"""A plan as lines to read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

_GIB = 2**30
_PARTS = {
    "weights": "weights",
    "gradients": "gradients",
    "optimizer": "optimizer",
    "activations": "activations",
    "reference": "reference",
    "hidden-state cache": "cache",
    "head chunk": "head",
    "layer at work": "layer",
}


def render(numbers: dict[str, Any]) -> str:
    """The plan as text."""
    lines = [*_model(numbers), *_data(numbers), *_memory(numbers), *_costs(numbers)]
    if "layouts" in numbers:
        lines += _layouts(numbers)
    if "check" in numbers:
        lines += _check(numbers["check"])
    return "\n".join([*lines, *(f"WARNING       {text}" for text in numbers["warnings"])])


def _model(n: dict[str, Any]) -> Iterator[str]:
    where = n["layout"]
    active = f"{n['active_parameters']:,} of them active, " if n["experts"] else ""
    yield (
        f"parameters    {n['parameters']:,} ({active}vocabulary {n['vocab_size']:,}, padded to "
        f"{n['padded_vocab_size']:,})"
    )
    chunks = f" x {where['vpp']} chunks" if where["vpp"] > 1 else ""
    context = f", CP {where['cp']}" if where["cp"] > 1 else ""
    experts = f", experts TP {where['etp']} EP {where['ep']}" if n["experts"] else ""
    counts = n["stage_layers"]
    if len(set(counts)) > 1:
        chunks += f" of {', '.join(map(str, counts[:-1]))} and {counts[-1]} layers"
    yield (
        f"layout        {n['gpus']} ranks: TP {where['tp']}{context}, PP {where['pp']}{chunks}, DP "
        f"{n['data_parallel']}{experts}; {n['microbatches']} microbatches of {n['micro_batch']} a step"
    )


def _data(n: dict[str, Any]) -> Iterator[str]:
    steps, tokens = n["iterations"], n["tokens"]
    if steps:
        yield f"iterations    {steps:,} of {n['tokens_per_step']:,} tokens"
        kind = "replayed" if tokens["forget"] else "learned"
        text = f"tokens        {tokens['learn']:,} {kind}"
        yield text + (f", {tokens['forget']:,} forgotten" if tokens["forget"] else "")
    else:
        epochs = n["chat_epochs"]
        count = f"set by the data: {epochs} epochs" if epochs else "not given"
        yield f"iterations    {count}, {n['tokens_per_step']:,} tokens a step"
    for use in n["data"]:
        yield (
            f"data          {use['role']} {use['share']:.2%} {use['prefix']}: {use['used']:,.0f} of "
            f"{use['tokens']:,.0f} tokens, {use['epochs']:.3f} epochs"
        )


def _memory(n: dict[str, Any]) -> Iterator[str]:
    present = {key for stage in n["stages"] for key, size in stage["parts"].items() if size}
    shown = {key: name for key, name in _PARTS.items() if key in present}
    widths = {key: max(8, len(name) + 1) for key, name in shown.items()}
    header = "".join(f"{name:>{widths[key]}}" for key, name in shown.items())
    unit, name = _unit_of_memory([stage["total"] for stage in n["stages"]])
    yield f"memory, {name}   stage{header}    total"
    for stage in n["stages"]:
        row = "".join(f"{stage['parts'].get(k, 0) / unit:{widths[k]}.2f}" for k in shown)
        yield f"              {stage['stage']:5}{row}{stage['total'] / unit:9.2f}"
    yield from _memory_notes(n)


def _memory_notes(n: dict[str, Any]) -> Iterator[str]:
    head = n["head"]
    part = head["logits"] / head["needed"]
    yield f"              head: logits of a microbatch, {part:.0%} of them at a time"
    if n["experts"]:
        yield "              experts are assumed to get equal shares of the tokens"
    if any(stage["parts"]["layer at work"] for stage in n["stages"]):
        yield "              layer: needed while a layer computes, beyond the memory that the head frees"
    if "hidden-state cache" in n["stages"][-1]["parts"]:
        yield "              cache: reference hidden states of the replayed tokens"
    passes = [s["stage"] for s in n["stages"] if s["reference_pass"] >= sum(s["parts"].values())]
    if passes:
        yield f"              total of stages {passes}: the reference's forward pass, which needs most"
    if host := max(stage["host"] for stage in n["stages"]):
        unit, name = _unit_of_memory([host])
        yield f"              and {host / unit:.2f} {name} of pinned host memory a rank"
    if n["gpu_memory"] is not None:
        share = n["memory_total"] / n["gpu_memory"]
        yield (
            f"              {share:.0%} of {n['gpu']}'s {n['gpu_memory'] / 1e9:g} GB, on stage "
            f"{n['worst_stage']}; CUDA context, NCCL and fragmentation come on top"
        )


def _unit_of_memory(sizes: Sequence[float]) -> tuple[int, str]:
    """Bytes of a unit in which not all sizes are 0.00, and its name."""
    return (2**20, "MiB") if max(sizes, default=_GIB) < _GIB else (_GIB, "GiB")


def _unit_of_time(times: Sequence[float]) -> tuple[float, str]:
    """Seconds of a unit in which not all times are 0.000, and its name."""
    return (1e-3, "ms") if max(times, default=1.0) < 0.1 else (1.0, "s")


def _costs(n: dict[str, Any]) -> Iterator[str]:
    whole = ""
    if n["seconds"] is not None:
        whole = f", {n['seconds'] / 3600:,.2f} h and {n['gpu_hours']:,.1f} rank-hours in all"
    unit, name = _unit_of_time([n["seconds_per_step"]])
    step = f"{n['seconds_per_step'] / unit:.3{'f' if name == 's' else 'g'}} {name}"
    yield (
        f"time          {step} a step{whole} at {n['mfu']:.0%} of "
        f"{n['peak_flops'] / 1e12:g} TFLOP/s a rank (assumed)"
    )
    if n["cost"] is not None:
        yield f"cost          {n['cost']:,.2f} at {n['price']:g} a rank-hour"
    each, count = n["checkpoint_bytes"] / 1e9, n["checkpoints"]
    text = f"checkpoint    {each:,.3f} GB, {n['checkpoint_weights_bytes'] / 1e9:,.3f} of it weights"
    text += f"; {count:,} of them {count * each:,.2f} GB" if count else ""
    if n["write_seconds"] is not None:
        text += f"; {n['write_seconds']:,.1f} s each at {n['write_bandwidth'] / 1e9:g} GB/s"
    yield text


def _layouts(n: dict[str, Any]) -> Iterator[str]:
    cp, ep = n["layout"]["cp"], n["experts"] is not None
    more = [text for text, there in ((f"CP {cp}", cp > 1), ("EP", ep)) if there]
    context = f"; communication of {' and '.join(more)} is counted with that of TP" if more else ""
    yield (
        f"layouts       {n['layouts_that_fit']:,} fit; the fastest by a model of the step (not measured), "
        f"products at {n['mfu']:.0%} of the peak{context}:"
    )
    memory, gib = _unit_of_memory([one["memory"] for one in n["layouts"]])
    time, s = _unit_of_time([one["seconds_per_step"] for one in n["layouts"]])
    yield (
        f"              TP  PP VPP{'  EP' if ep else ''}   DP micro recompute   {gib}  {s:>2}/step = "
        "compute +    TP + bubble + stages +   DP + reference"
    )
    for one in n["layouts"]:
        parts = {name: seconds / time for name, seconds in one["parts"].items()}
        beside = sum(parts[f"{name}_parallel"] for name in ("tensor", "context", "expert"))
        groups = f"{one['ep']:4}" if ep else ""
        yield (
            f"              {one['tp']:2} {one['pp']:3} {one['vpp']:3}{groups} {one['dp']:4} "
            f"{one['micro_batch']:5} {one['recompute']:>9} {one['memory'] / memory:5.1f} "
            f"{one['seconds_per_step'] / time:8.3f}   {parts['compute']:7.3f} {beside:7.3f} "
            f"{parts['bubble']:8.3f} {parts['pipeline']:8.3f} {parts['data_parallel']:6.3f} "
            f"{parts['reference']:11.3f}"
        )
        if one["stage_flags"]:
            yield f"                with {one['stage_flags']}"
    if not n["layouts"]:
        yield "              none"


def _check(c: dict[str, Any]) -> Iterator[str]:
    yield f"check         rank {c['rank']}, stage {c['stage']}: planned, and as Megatron builds it"
    for part in c["planned"]:
        planned, built = c["planned"][part], c["built"].get(part, 0)
        unit = "" if part == "parameters" else " bytes"
        verdict = "equal" if planned == built else f"DIFFERS, built {built:,}{unit}"
        yield f"              {part:<11}{planned:>18,}{unit}, {verdict}"
