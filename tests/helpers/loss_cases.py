"""Inputs that the losses, and whatever else computes them, are judged on."""

import itertools
import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

# Both sides of every place where a formula could switch, and the ends of the promised range.
MARGINS = (-60.0, -40.0, -20.1, -19.9, -15.0, -10.5, -8.0, -3.0, -1.0, -1e-3, 0.0)
MARGINS += (1e-3, 1.0, 3.0, 8.0, 10.5, 15.0, 19.9, 20.1, 40.0, 60.0, 88.0, 104.0, 120.0)


@dataclass(frozen=True)
class Case:
    """Logits `[N, V]`, labels `[N]`, reference logits `[N, V]`; V is a multiple of 4."""

    name: str
    logits: Tensor
    labels: Tensor
    reference: Tensor
    vocab_size: int


def accuracy_case(vocab_size: int, dtype: torch.dtype, *, margins=MARGINS) -> Case:
    """Random logits with given margins, labels over the whole vocabulary, and padding of 1e4.

    The reference is at distances from 1e-4 to 3 of the student: KL from 1e-9 to several nats.
    """
    rng = torch.Generator().manual_seed(vocab_size)
    rows, columns = len(margins), -(-vocab_size // 4) * 4
    logits = 3 * torch.randn(rows, columns, generator=rng, dtype=torch.float64)
    # First, last, and evenly between: on every shard.
    labels = torch.linspace(0, vocab_size - 1, rows).long()
    labels = labels[torch.randperm(rows, generator=rng)]
    distance = torch.logspace(-4, 0.5, rows, dtype=torch.float64).unsqueeze(-1)
    noise = torch.randn(logits.shape, generator=rng, dtype=torch.float64)
    rest = logits[:, :vocab_size].scatter(-1, labels[:, None], -torch.inf).logsumexp(-1)
    logits.scatter_(-1, labels[:, None], (rest + torch.tensor(margins))[:, None])
    reference = logits + distance * noise
    logits[:, vocab_size:] = 1e4
    reference[:, vocab_size:] = 1e4
    name = f"V{vocab_size}-{str(dtype).removeprefix('torch.')}"
    return Case(name, logits.to(dtype), labels, reference.to(dtype), vocab_size)


def accuracy_cases() -> list[Case]:
    """V from 11 to 131,072, in fp32 and bf16; few rows where V is large."""
    few = (-60.0, -19.9, 0.0, 8.0, 40.0, 120.0)
    return [
        accuracy_case(vocab_size, dtype, margins=margins)
        for vocab_size, margins in ((11, MARGINS), (1000, MARGINS), (32003, few), (131072, few))
        for dtype in (torch.float32, torch.bfloat16)
    ]


def hostile_cases() -> list[Case]:
    """Logits that break one shortcut or another; of 4 shards, one has 1 column and one none."""
    rng = torch.Generator().manual_seed(1)
    rows, columns, vocab_size = 12, 32, 17

    def normal(scale: float) -> Tensor:
        return scale * torch.randn(rows, columns, generator=rng)

    labels = torch.tensor([0, 7, 8, 15, 16, 14, 1, 2, 9, 10, 13, 3])
    student = normal(3)
    hot = torch.zeros(rows, columns)
    hot[:, 8] = 50
    extreme = torch.full((rows, columns), -3e38)
    extreme[torch.arange(rows), 1 + (torch.arange(rows) * 5) % 15] = 3e38
    pairs = {
        "all equal": (torch.zeros(rows, columns), torch.full((rows, columns), -7.0)),
        "one-hot": (hot, hot.roll(3, -1)),
        "offset 1e4": (student + 1e4, student + 1e4 + normal(0.1)),
        "offsets apart": (student - 1e4, student + 1e4),
        "reference is student": (student, student.clone()),
        "KL 1e-7": (student, student + normal(3e-4)),
        "KL 1e-11": (student, student + normal(3e-6)),
        "reference far": (normal(30), normal(30)),
        "all 1e9": (torch.full((rows, columns), 1e9), torch.full((rows, columns), -1e9)),
        "spread 1e4": (normal(1e4), normal(1e4)),
        "spread 6e38": (extreme, extreme.roll(1, -1)),
    }
    cases = []
    for name, (logits, reference) in pairs.items():
        logits[:, vocab_size:] = 3e38
        reference[:, vocab_size:] = -3e38
        cases.append(Case(name, logits, labels, reference, vocab_size))
    return cases


# Of a bad logit: whose it is, whether it is the label's, and what it is.
POISONS = tuple(
    itertools.product(("student", "reference"), ("label", "other"), (math.nan, math.inf))
)


def poisoned(case: Case) -> Case:
    """The case with one bad logit in each of its first rows, one row for each of `POISONS`."""
    logits, reference = case.logits.clone(), case.reference.clone()
    for row, (whose, column, value) in enumerate(POISONS):
        label = int(case.labels[row])
        at = label if column == "label" else (label + 5) % case.vocab_size
        (logits if whose == "student" else reference)[row, at] = value
    return replace(case, logits=logits, reference=reference)


def spoilt(rows: int, whose: str = "", column: str = "") -> Tensor:
    """`[rows]`: where `poisoned` put a bad logit, or only those of one side or column."""
    found = [whose in poison[0] and column in poison[1] for poison in POISONS]
    return torch.tensor(found + [False] * (rows - len(POISONS)))
