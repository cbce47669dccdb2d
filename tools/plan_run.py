#!/usr/bin/env python
"""What a run of pretrain_unlearn.py would cost, from the flags that would start it.

    python tools/plan_run.py --gpus 64 -- --num-layers 32 --hidden-size 2048 ... --train-iters 1000

Prints parameters, tokens, iterations, data epochs, memory a GPU by part, time at an assumed model
FLOPs utilisation, and the size of a checkpoint. Starts nothing and imports no torch.
"""

from __future__ import annotations

import argparse
import json
import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_ext.analysis.plan import (
    Architecture,
    DatasetUse,
    Layout,
    Unlearning,
    checkpoint_bytes,
    dataset_uses,
    step_flops,
    worst_stage,
)
from megatron_ext.data.tokenizers import TokenizerSpec, build_reference
from megatron_ext.exceptions import ConfigError
from tools.common import run_tool

_REQUIRED_SIZES = (
    *("num-layers", "hidden-size", "ffn-hidden-size", "num-attention-heads"),
    *("seq-length", "micro-batch-size", "global-batch-size"),
)
_OPTIONAL_SIZES = ("num-query-groups", "kv-channels", "vocab-size", "train-iters", "save-interval")
_SWITCHES = (
    *("swiglu", "disable-bias-linear", "untie-embeddings-and-output-weights", "bf16"),
    *("use-distributed-optimizer", "sequence-parallel", "reference-offload"),
)
# Flags that change the numbers in ways that plan.py does not know.
_NOT_PLANNED = (
    *("num-experts", "context-parallel-size", "num-layers-per-virtual-pipeline-stage"),
    *("num-virtual-stages-per-pipeline-rank", "rampup-batch-size", "mtp-num-layers"),
    *("train-data-path", "forget-train-data-path", "train-samples"),
)


def entry_flags(words: Sequence[str]) -> Namespace:
    """The flags of pretrain_unlearn.py that decide about cost; the others are passed over.

    Raises:
        ConfigError: a size is missing, or a flag is there that this plan does not know.
    """
    parser = argparse.ArgumentParser(allow_abbrev=False, add_help=False)
    for name in (*_REQUIRED_SIZES, *_OPTIONAL_SIZES):
        parser.add_argument(f"--{name}", type=int)
    for name in ("tensor-model-parallel-size", "pipeline-model-parallel-size"):
        parser.add_argument(f"--{name}", type=int, default=1)
    for name in _SWITCHES:
        parser.add_argument(f"--{name}", action="store_true")
    parser.add_argument("--make-vocab-size-divisible-by", type=int, default=128)
    parser.add_argument("--recompute-granularity", choices=("selective", "full"), default="none")
    parser.add_argument("--tokenizer-type", default="SentencePieceTokenizer")
    parser.add_argument("--tokenizer-model")
    parser.add_argument("--data-path", nargs="+")
    parser.add_argument("--forget-data-path", nargs="+")
    parser.add_argument("--forget-batch-size", type=int)
    parser.add_argument("--mitigation-weight", type=float, default=1.0)
    parser.add_argument("--split", default="969,30,1")  # Megatron's
    parser.add_argument("--chat-data-path", nargs="+")
    parser.add_argument("--chat-epochs", type=float)
    for name in _NOT_PLANNED:
        parser.add_argument(f"--{name}", nargs="+")
    flags, _ = parser.parse_known_args(words)
    for name in _REQUIRED_SIZES:
        if getattr(flags, name.replace("-", "_")) is None:
            raise ConfigError(f"--{name}: expected a size, found none")
    for name in _NOT_PLANNED:
        if getattr(flags, name.replace("-", "_")) is not None:
            raise ConfigError(f"--{name} is not known to this plan")
    for name in ("swiglu", "disable-bias-linear"):
        if not getattr(flags, name.replace("-", "_")):
            raise ConfigError(f"--{name}: expected, found none; the plan is for Llama-like models")
    return flags


def architecture(flags: Namespace) -> Architecture:
    """The model of these flags; the vocabulary is the tokenizer's unless --vocab-size is given."""
    vocab_size = flags.vocab_size
    if vocab_size is None:
        if flags.tokenizer_model is None:
            raise ConfigError("--tokenizer-model or --vocab-size: expected one, found none")
        spec = TokenizerSpec(
            tokenizer_type=flags.tokenizer_type, tokenizer_model=flags.tokenizer_model
        )
        vocab_size = build_reference(spec).vocab_size
    return Architecture(
        layers=flags.num_layers,
        hidden=flags.hidden_size,
        ffn=flags.ffn_hidden_size,
        heads=flags.num_attention_heads,
        query_groups=flags.num_query_groups or flags.num_attention_heads,
        head_size=flags.kv_channels or flags.hidden_size // flags.num_attention_heads,
        vocab_size=vocab_size,
        vocab_multiple=flags.make_vocab_size_divisible_by,
        tied=not flags.untie_embeddings_and_output_weights,
    )


def layout(flags: Namespace, *, gpus: int) -> Layout:
    """How these flags spread the run over GPUs."""
    return Layout(
        gpus=gpus,
        tp=flags.tensor_model_parallel_size,
        pp=flags.pipeline_model_parallel_size,
        micro_batch=flags.micro_batch_size,
        global_batch=flags.global_batch_size,
        sequence=flags.seq_length,
        sequence_parallel=flags.sequence_parallel,
        distributed_optimizer=flags.use_distributed_optimizer,
        bf16=flags.bf16,
        recompute=flags.recompute_granularity,
    )


def plan(flags: Namespace, *, gpus: int, mfu: float, peak_flops: float) -> dict[str, Any]:
    """Every number of the plan, as it is written to JSON. Tokens, bytes and seconds."""
    arch, where = architecture(flags), layout(flags, gpus=gpus)
    unlearning, forget = None, 0
    if flags.forget_data_path:
        forget = flags.forget_batch_size or flags.global_batch_size // 2
        if forget % (unit := where.micro_batch * where.data_parallel):
            raise ConfigError(
                f"--forget-batch-size: expected a multiple of {unit} (micro-batch size x data-parallel "
                f"size), found {forget}"
            )
        unlearning = Unlearning(
            forget_batch=forget,
            reference=flags.mitigation_weight > 0,
            reference_offload=flags.reference_offload,
        )
    stage, memory = worst_stage(arch, where, unlearning)
    steps = flags.train_iters
    learned = (where.global_batch - forget) * where.sequence * (steps or 0)
    forgotten = forget * where.sequence * (steps or 0)
    uses: list[tuple[str, DatasetUse]] = []
    if steps:
        for role, blend, tokens in (
            ("replay" if forget else "learn", flags.data_path, learned),
            ("forget", flags.forget_data_path, forgotten),
        ):
            blended = dataset_uses(blend or [], tokens=tokens, split=flags.split) if blend else []
            uses += [(role, use) for use in blended]
    seconds = step_flops(arch, where, unlearning) / (gpus * peak_flops * mfu)
    return {
        "parameters": arch.parameters(where.tp),
        "vocab_size": arch.vocab_size,
        "padded_vocab_size": arch.padded_vocab(where.tp),
        "gpus": gpus,
        "data_parallel": where.data_parallel,
        "microbatches": where.microbatches,
        "tokens_per_step": where.tokens_per_step,
        "iterations": steps,
        "tokens": {"learn": learned, "forget": forgotten},
        "data": [{"role": role, **vars(use), "epochs": use.epochs} for role, use in uses],
        "chat_epochs": flags.chat_epochs if flags.chat_data_path else None,
        "worst_stage": stage,
        "memory": memory,
        "memory_total": sum(memory.values()),
        "seconds_per_step": seconds,
        "seconds": seconds * steps if steps else None,
        "mfu": mfu,
        "peak_flops": peak_flops,
        "checkpoint_bytes": checkpoint_bytes(arch, tp=where.tp, bf16=where.bf16),
        "checkpoints": -(-steps // flags.save_interval) if steps and flags.save_interval else None,
    }


def render(numbers: dict[str, Any]) -> str:
    """The plan as lines to read."""
    n, gib = numbers, 2**30
    steps, tokens = n["iterations"], n["tokens"]
    lines = [
        f"parameters    {n['parameters']:,} (vocabulary {n['vocab_size']:,}, padded to "
        f"{n['padded_vocab_size']:,})",
        f"layout        {n['gpus']} ranks, data parallel {n['data_parallel']}, "
        f"{n['microbatches']} microbatches a step",
    ]
    if steps:
        lines.append(f"iterations    {steps:,} of {n['tokens_per_step']:,} tokens")
        kind = "replayed" if tokens["forget"] else "learned"
        text = f"tokens        {tokens['learn']:,} {kind}"
        lines.append(text + (f", {tokens['forget']:,} forgotten" if tokens["forget"] else ""))
    else:
        lines.append(
            f"iterations    set by the data: {n['chat_epochs'] or 1:g} epochs, "
            f"{n['tokens_per_step']:,} tokens a step"
        )
    for use in n["data"]:
        lines.append(
            f"data          {use['role']} {use['share']:.2%} {use['prefix']}: {use['used']:,.0f} of "
            f"{use['tokens']:,.0f} tokens, {use['epochs']:.3f} epochs"
        )
    total = n["memory_total"] / gib
    lines.append(f"memory        {total:.2f} GiB a rank, on pipeline stage {n['worst_stage']}:")
    lines += [f"              {size / gib:8.2f} {part}" for part, size in n["memory"].items()]
    lines.append("              without CUDA context, NCCL and logits (made in what is left)")
    lines.append(
        f"time          {n['seconds_per_step']:.3f} s a step"
        + (f", {n['seconds'] / 3600:,.2f} h in all" if n["seconds"] is not None else "")
        + f" at {n['mfu']:.0%} of {n['peak_flops'] / 1e12:g} TFLOP/s a rank"
    )
    each = n["checkpoint_bytes"] / 1e9
    count = n["checkpoints"]
    saves = f", {count:,} of them {count * each:,.2f} GB" if count else ""
    lines.append(f"checkpoint    {each:,.3f} GB{saves}")
    return "\n".join(lines)


def main() -> None:
    """Parse, plan, print."""
    words = sys.argv[1:]
    cut = words.index("--") if "--" in words else len(words)
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gpus", type=int, required=True, help="ranks of the run, all nodes")
    parser.add_argument("--mfu", type=float, default=0.45, help="model FLOPs utilisation to assume")
    parser.add_argument(
        "--peak-flops", type=float, default=989e12, help="of a GPU; H100 and H200 bf16, dense"
    )
    parser.add_argument("--json", action="store_true", help="numbers instead of text")
    options = parser.parse_args(words[:cut])
    numbers = plan(
        entry_flags(words[cut + 1 :]),
        gpus=options.gpus,
        mfu=options.mfu,
        peak_flops=options.peak_flops,
    )
    print(json.dumps(numbers, indent=1) if options.json else render(numbers))


if __name__ == "__main__":
    run_tool(main)
