"""What arXiv 2406.12397 reports, to stand beside one's own numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from megatron_ext.evaluation.errors import aligned, with_error

# For each column of the paper's table the task of lm-evaluation-harness and its score. Averages of the
# paper are over these six.
BENCHMARKS = {
    "C-Eval": ("ceval-valid", "acc,none"),
    "CMMLU": ("cmmlu", "acc,none"),
    "MMLU": ("mmlu", "acc,none"),
    "HumanEval": ("humaneval", "pass@1,create_test"),
    "MBPP": ("mbpp", "pass_at_1,none"),
    "GSM8K": ("gsm8k", "exact_match,strict-match"),
}
# Percent, a column each.
BASE: dict[str, tuple[float, ...]] = {
    "BaseLM": (39.05, 38.83, 38.08, 9.76, 12.00, 15.09),
    "SynthLM": (47.71, 47.56, 47.27, 18.90, 18.40, 16.60),
    "RefineLM": (46.79, 47.15, 45.82, 17.07, 18.30, 13.42),
    "UnlearnLM": (48.09, 47.29, 47.53, 20.73, 18.60, 11.45),
    "UnlearnLM (GA)": (26.58, 25.08, 39.28, 11.59, 9.60, 6.82),
}
# FollowBench SSR and HSR in percent, MT-Bench from 1 to 10.
CHAT: dict[str, tuple[float, float, float]] = {
    "BaseLM-Chat": (39.95, 27.58, 5.45),
    "SynthLM-Chat": (38.29, 24.00, 5.39),
    "RefineLM-Chat": (39.60, 25.22, 5.43),
    "UnlearnLM-Chat": (42.00, 27.87, 5.85),
    "BaseLM-Chat (O.H.)": (40.25, 27.27, 5.76),
    "SynthLM*-Chat (O.H.)": (39.95, 25.13, 5.61),
    "UnlearnLM*-Chat (O.H.)": (40.21, 27.26, 5.87),
}
_OURS, _PAPER = "this run", "paper"


def table(
    columns: Sequence[str],
    ours: Mapping[str, Sequence[float | None]],
    paper: Mapping[str, Sequence[float | None]],
    *,
    errors: Mapping[str, Sequence[float | None]],
) -> str:
    """A Markdown table of one's own models, then the paper's.

    Args:
        columns: what the numbers are.
        ours: numbers by model; ``None`` was not measured.
        paper: the same of the paper.
        errors: standard errors of one's own numbers; ``None`` is not known.
    """
    lines = [["model", "source", *columns]]
    for source, models in ((_OURS, ours), (_PAPER, paper)):
        for model, values in models.items():
            known = errors[model] if source == _OURS else [None] * len(values)
            numbers = [
                "" if value is None else with_error(value, error)
                for value, error in zip(values, known, strict=True)
            ]
            lines.append([model, source, *numbers])
    for i in range(2, len(lines[0])):
        for line, cell in zip(lines[1:], aligned([line[i] for line in lines[1:]]), strict=True):
            line[i] = cell
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]

    def row(cells: Sequence[str]) -> str:
        padded = [
            cell.rjust(width) if i > 1 else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ]
        return f"| {' | '.join(padded)} |"

    rule = ["-" * width if i < 2 else "-" * (width - 1) + ":" for i, width in enumerate(widths)]
    return "\n".join([row(lines[0]), row(rule), *map(row, lines[1:])])
