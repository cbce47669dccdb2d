"""All numbers of a plan, as they are written to JSON: tokens, bytes, seconds."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import replace
from typing import Any

from megatron_ext.data.blend import MOST_EPOCHS
from megatron_ext.exceptions import ConfigError
from megatron_ext.gpus import Cluster
from megatron_ext.planning import flags as entry
from megatron_ext.planning.architecture import Architecture
from megatron_ext.planning.data import check_made_with, check_samples, check_split, dataset_uses
from megatron_ext.planning.layout import Layout, Unlearning
from megatron_ext.planning.memory import StageMemory, all_stages, checkpoint_bytes
from megatron_ext.planning.ranking import Candidate, rank_layouts
from megatron_ext.planning.steps import step_flops


def plan(flags: Namespace, cluster: Cluster, *, ranked: int = 0) -> dict[str, Any]:
    """Every number of the plan.

    Args:
        flags: of the entry point, from `flags.entry_flags`.
        cluster: what the run is planned for.
        ranked: how many of the fastest layouts to list.

    Raises:
        ConfigError: a layout that does not divide.
        DataError: a dataset is missing or broken.
    """
    arch = entry.architecture(flags)
    layout = entry.layout(flags, gpus=cluster.gpus, cpu=cluster.gpu is None)
    unlearning = entry.unlearning(flags)
    stages = all_stages(arch, layout, unlearning, capacity=cluster.memory)
    numbers = (
        _model(arch, layout)
        | _tokens(flags, layout, unlearning)
        | _memory(stages, cluster)
        | _time(arch, layout, unlearning, cluster, flags)
        | _checkpoints(arch, layout, cluster, flags)
    )
    numbers["warnings"] = _warnings(numbers, flags)
    if ranked:
        found = _ranked(arch, layout, unlearning, cluster)
        numbers["layouts_that_fit"] = len(found)
        numbers["layouts"] = [_candidate(one, arch.layers) for one in found[:ranked]]
    return numbers


def _model(arch: Architecture, layout: Layout) -> dict[str, Any]:
    return {
        "parameters": arch.parameters(layout.tp),
        "active_parameters": arch.active_parameters(layout.tp),
        "vocab_size": arch.vocab_size,
        "padded_vocab_size": arch.padded_vocab(layout.tp),
        "gpus": layout.gpus,
        "layout": {name: getattr(layout, name) for name in ("tp", "cp", "pp", "vpp", "ep", "etp")},
        "stage_layers": layout.split.layers(arch.layers),
        "experts": None if arch.mixture is None else arch.mixture.experts,
        "data_parallel": layout.data_parallel,
        "micro_batch": layout.micro_batch,
        "microbatches": layout.microbatches,
        "tokens_per_step": layout.tokens_per_step,
    }


def _tokens(flags: Namespace, layout: Layout, unlearning: Unlearning | None) -> dict[str, Any]:
    """Tokens of each role, and how often each dataset is read."""
    steps = entry.steps(flags) or 0
    forget = 0 if unlearning is None else unlearning.forget_batch
    tokens = {
        "learn": (layout.global_batch - forget) * layout.sequence * steps,
        "forget": forget * layout.sequence * steps,
    }
    if steps:
        _check_data(flags, layout, forget)
    uses = []
    for role, blend, name in (
        ("learn", flags.data_path, "replay" if forget else "learn"),
        ("forget", flags.forget_data_path, "forget"),
    ):
        if steps and blend:
            used = dataset_uses(blend, tokens=tokens[role], split=flags.split)
            uses += [{"role": name, **vars(use), "epochs": use.epochs} for use in used]
    return {
        "iterations": entry.steps(flags),
        "tokens": tokens,
        "data": uses,
        "chat_epochs": flags.chat_epochs if flags.chat_data_path else None,
    }


def _check_data(flags: Namespace, layout: Layout, forget: int) -> None:
    """Refuse data of another tokenizer, without a document of a split, or that end before the run does."""
    # Of a last part of a batch a run reads the samples, but takes no step.
    samples = flags.train_samples or flags.train_iters * layout.global_batch
    batches = -(-samples // layout.global_batch)
    learned = batches * (layout.global_batch - forget) if forget else samples
    tokenizer = entry.tokenizer(flags)
    for flag, blend, wanted in (
        ("--data-path", flags.data_path, learned),
        ("--forget-data-path", flags.forget_data_path, batches * forget),
    ):
        if blend and tokenizer is not None:
            check_made_with(blend, tokenizer, flag=flag)
        if blend:
            check_split(blend, flags=flags, flag=flag)
        if blend and flags.dataloader_type == "single":  # another one begins again
            check_samples(
                blend, wanted=wanted, sequence=layout.sequence, split=flags.split, flag=flag
            )


def _memory(stages: list[StageMemory], cluster: Cluster) -> dict[str, Any]:
    worst = max(stages, key=lambda stage: stage.total)
    head = stages[-1].head
    assert head is not None
    return {
        "stages": [
            {
                "stage": stage.stage,
                "parts": stage.parts,
                "reference_pass": stage.reference_pass,
                "host": stage.host,
                "total": stage.total,
            }
            for stage in stages
        ],
        "head": vars(head),
        "worst_stage": worst.stage,
        "memory_total": worst.total,
        "gpu": cluster.name,
        "gpu_memory": cluster.memory,
        "fits": None if cluster.memory is None else worst.total <= cluster.memory,
    }


def _time(
    arch: Architecture,
    layout: Layout,
    unlearning: Unlearning | None,
    cluster: Cluster,
    flags: Namespace,
) -> dict[str, Any]:
    """Time and cost from the assumed utilisation."""
    rate = cluster.gpus * cluster.peak_flops * cluster.mfu
    step = step_flops(arch, layout, unlearning) / rate
    steps = entry.steps(flags)
    total = step * steps if steps else None
    hours = None if total is None else total / 3600 * cluster.gpus
    return {
        "seconds_per_step": step,
        "seconds": total,
        "gpu_hours": hours,
        "price": cluster.price,
        "cost": None if hours is None or cluster.price is None else hours * cluster.price,
        "mfu": cluster.mfu,
        "peak_flops": cluster.peak_flops,
    }


def _checkpoints(
    arch: Architecture, layout: Layout, cluster: Cluster, flags: Namespace
) -> dict[str, Any]:
    size = checkpoint_bytes(arch, tp=layout.tp, half=layout.half)
    # Of older ones only some are kept; the last step is saved in any case.
    kept = flags.save_interval and (flags.save_retain_interval or flags.save_interval)
    steps = entry.steps(flags)
    return {
        "checkpoint_bytes": size,
        "checkpoint_weights_bytes": arch.parameters(layout.tp) * layout.element,
        "checkpoints": -(-steps // kept) if steps and kept else None,
        "write_bandwidth": cluster.write_bandwidth,
        "write_seconds": size / cluster.write_bandwidth if cluster.write_bandwidth else None,
    }


def _warnings(numbers: dict[str, Any], flags: Namespace) -> list[str]:
    gib = 2**30
    found = []
    if drops := [name for name in entry.DROPOUTS if getattr(flags, name.replace("-", "_")) > 0]:
        found.append(
            f"{' and '.join(f'--{name}' for name in drops)} above 0 (Megatron's default is 0.1): what "
            "dropout keeps for the backward pass is not counted"
        )
    if numbers["fits"] is False:
        found.append(
            f"does not fit: stage {numbers['worst_stage']} needs "
            f"{numbers['memory_total'] / gib:.2f} GiB, {numbers['gpu']} has "
            f"{numbers['gpu_memory'] / gib:.2f}; see --rank-layouts"
        )
    found += [
        f"{use['prefix']}: {use['epochs']:.1f} epochs, more than {MOST_EPOCHS} (arXiv 2305.16264)"
        for use in numbers["data"]
        if use["epochs"] > MOST_EPOCHS
    ]
    return found


def _ranked(
    arch: Architecture, layout: Layout, unlearning: Unlearning | None, cluster: Cluster
) -> list[Candidate]:
    if cluster.gpu is None:
        raise ConfigError("--rank-layouts: expected a --gpu-type with memory and links, found CPU")
    return rank_layouts(
        arch,
        layout,
        unlearning,
        gpu=replace(cluster.gpu, flops=cluster.peak_flops),
        gpus_per_node=cluster.gpus_per_node,
        utilisation=cluster.mfu,
    )


def _candidate(one: Candidate, layers: int) -> dict[str, Any]:
    layout = one.layout
    return {
        "tp": layout.tp,
        "cp": layout.cp,
        "pp": layout.pp,
        "vpp": layout.vpp,
        "ep": layout.ep,
        "stage_layers": layout.split.layers(layers),
        "stage_flags": layout.split.flags(),
        "dp": layout.data_parallel,
        "micro_batch": layout.micro_batch,
        "recompute": layout.recompute,
        "memory": one.memory,
        "seconds_per_step": one.time.total,
        "parts": vars(one.time),
    }
