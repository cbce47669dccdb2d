#!/usr/bin/env python
r"""How good a model is: benchmarks, beside the numbers of arXiv 2406.12397.

    python tools/evaluate.py harness --model ckpt/base --name mine --data-dir data --output scores.json \
        --tasks mmlu cmmlu ceval-valid gsm8k ifeval humaneval mbpp --allow-code-execution
    python tools/evaluate.py followbench --model ckpt/chat --name mine --followbench FollowBench \
        --judge-url http://localhost:8000/v1 --judge-model JUDGE --output-dir results
    python tools/evaluate.py mt-bench --model exported --backend huggingface --name mine \
        --questions question.jsonl --judge-prompts judge_prompts.jsonl \
        --reference-answers reference_answer/gpt-4.jsonl --judge-url ... --judge-model ... --output-dir ...

harness is lm-evaluation-harness (requirements-eval.txt). For the others, with --model answers are
generated, and with --judge-url they are judged; each half may run by itself, on another machine: the files
between them are the projects' own. A Megatron checkpoint runs at any layout, under torchrun.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from tools.common import ToolParser, run_tool


def main() -> None:
    """Parse the command line and run a verb."""
    from megatron_ext import launched
    from megatron_ext.evaluation import followbench_run, harness, mtbench_run

    parser = ToolParser(description=__doc__)
    verbs = parser.add_subparsers(dest="verb", required=True)
    followbench = verbs.add_parser("followbench", help="SSR, HSR and CSL of a chat model")
    followbench_run.add_arguments(followbench)
    mtbench = verbs.add_parser("mt-bench", help="two turns, rated from 1 to 10")
    mtbench_run.add_arguments(mtbench)
    tasks = verbs.add_parser("harness", help="tasks of lm-evaluation-harness")
    harness.add_arguments(tasks)
    options = parser.parse_args()
    options.is_writer = launched.rank() == "0"
    runs = {"followbench": followbench_run.run, "mt-bench": mtbench_run.run, "harness": harness.run}
    runs[options.verb](options)


if __name__ == "__main__":
    run_tool(main)
