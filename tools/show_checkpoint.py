#!/usr/bin/env python
"""Show what the folder of a run holds: its checkpoints, and what one of them is.

    python tools/show_checkpoint.py ckpt/run [--iteration 1000] [--json]

No tensor is read. The exit code is 2 if the checkpoint that is asked for is not there or not complete.
"""

import json
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_ext.runtime import console

console.quiet()

from megatron_ext.checkpoint.complete import defect  # noqa: E402
from megatron_ext.checkpoint.inspect import (  # noqa: E402
    Checkpoint,
    open_checkpoint,
    tracked,
)
from megatron_ext.exceptions import CheckpointError  # noqa: E402
from megatron_ext.rates import rate_of  # noqa: E402
from tools.common import ToolParser, run_tool  # noqa: E402

_SIZES = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "seq_length")
_LAYOUT = {
    "TP": "tensor_model_parallel_size",
    "PP": "pipeline_model_parallel_size",
    "CP": "context_parallel_size",
    "EP": "expert_model_parallel_size",
    "DP": "data_parallel_size",
}
_WEIGHTS = ("forget_weight", "replay_weight", "mitigation_weight")


def main() -> None:
    """Parses the command line and prints."""
    parser = ToolParser(description=__doc__)
    parser.add_argument("directory", type=Path, help="the folder that --save named")
    parser.add_argument("--iteration", type=int, help="iteration to show; default: the latest")
    parser.add_argument("--json", action="store_true", help="print as JSON")
    args = parser.parse_args()
    found = {"folder": str(args.directory), **checkpoints(args.directory)}
    flags = {"flag": "directory", "iteration_flag": "--iteration"}
    try:
        found |= contents(open_checkpoint(args.directory, iteration=args.iteration, **flags))
    except CheckpointError as error:  # what else is there is told all the same
        found["error"] = str(error)
    print(json.dumps(found, indent=1) if args.json else "\n".join(lines(found)))
    sys.exit(2 if "error" in found else 0)


def checkpoints(directory: Path) -> dict[str, Any]:
    """What the tracker file names, and of each iteration on disk why it is not complete, or `None`."""
    found = {path.name: defect(path) for path in sorted(directory.glob("iter_*"))}
    return {"latest": tracked(directory), "checkpoints": found}


def contents(checkpoint: Checkpoint) -> dict[str, Any]:
    """What a checkpoint records of its run; what its writer did not record is `None`."""
    saved = checkpoint.args
    samples, length = (_of(saved, name) for name in ("consumed_train_samples", "seq_length"))
    files = [path for path in checkpoint.path.iterdir() if path.is_file()]
    schedule, rate = checkpoint.schedule, None
    if schedule is not None:
        rate = rate_of(schedule, saved, samples=schedule["num_steps"])
    return {
        "checkpoint": checkpoint.path.name,
        "iteration": checkpoint.iteration,
        "train_iters": _of(saved, "train_iters"),
        "consumed_samples": samples,
        "consumed_tokens": samples * length if samples is not None and length is not None else None,
        "kind": _kind(saved),
        "objective": _objective(saved),
        "reference": _of(saved, "unlearn_reference"),
        "model": {name: _of(saved, name) for name in _SIZES},
        "vocab_size": _of(saved, "unpadded_vocab_size") or _of(saved, "padded_vocab_size"),
        "layout": {name: _of(saved, flag) for name, flag in _LAYOUT.items()},
        "global_batch_size": _of(saved, "global_batch_size"),
        "precision": next((name for name in ("bf16", "fp16") if _of(saved, name)), "fp32"),
        "optimizer": _of(saved, "optimizer"),
        "schedule": schedule,
        "learning_rate": rate,
        "software": _of(saved, "software"),
        "size_bytes": sum(path.stat().st_size for path in files),
    }


def _of(saved: Namespace, name: str) -> Any:
    return getattr(saved, name, None)


def _kind(saved: Namespace) -> str:
    if _of(saved, "unlearn_composition") is not None:
        return "unlearning"
    return "plain training" if _of(saved, "chat_digest") is None else "chat tuning"


def _objective(saved: Namespace) -> dict[str, Any] | None:
    if _of(saved, "unlearn_composition") is None:
        return None
    names = ("forget_loss", *_WEIGHTS)
    return {name: _of(saved, name) for name in names} | {"batches": saved.unlearn_composition}


def lines(found: dict[str, Any]) -> list[str]:
    """A line for each thing that is known."""
    shown = dict(found)
    shown["checkpoints"] = ", ".join(
        name if broken is None else f"{name} (broken: {broken})"
        for name, broken in found["checkpoints"].items()
    )
    texts = {
        name.replace("_", " "): _text(value) for name, value in shown.items() if value is not None
    }
    width = max(map(len, texts)) + 1
    return [f"{f'{name}:':{width}} {text}" for name, text in texts.items()]


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_text(part)}" for name, part in value.items())
    return f"{value:,}" if isinstance(value, int) else str(value)


if __name__ == "__main__":
    run_tool(main)
