"""pass@k of generated programs, in place of the metric that lm-evaluation-harness fetches from the hub.

Generated code runs on this machine: each program in a process of its own, in an empty directory, without
the environment, and with bounds on time, memory and the size of files. That keeps honest mistakes small; it
is no jail for hostile code, and a user has to allow it.
"""

from __future__ import annotations

import random
import resource
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from math import comb
from statistics import fmean
from typing import Any

# Under no name of its own, as `code_eval` runs it: what stands behind `if __name__ == "__main__"` does not
# count.
_RUN = "import sys; exec(sys.stdin.read(), {})"
_SECONDS = 10
_BYTES = 4 << 30
_FILE_BYTES = 1 << 20


class CodeEval:
    """The part of `evaluate`'s ``code_eval`` that the tasks use.

    Args:
        workers: programs at a time.
    """

    def __init__(self, *, workers: int = 4) -> None:
        self._workers = workers

    def compute(
        self, *, references: Sequence[str], predictions: Sequence[Sequence[str]], k: Sequence[int]
    ) -> tuple[dict[str, float], dict[int, list[bool]]]:
        """Run every candidate with its tests.

        Args:
            references: tests of each problem.
            predictions: candidates of each problem.
            k: the numbers of attempts that are asked for.

        Returns:
            ``pass@k`` for each k that there are candidates enough for, and what passed by problem.
        """
        programs = [
            f"{candidate}\n{tests}"
            for tests, candidates in zip(references, predictions, strict=True)
            for candidate in candidates
        ]
        with ThreadPoolExecutor(max_workers=self._workers) as pool:
            results = iter(pool.map(runs, programs))
            passed = {i: [next(results) for _ in group] for i, group in enumerate(predictions)}
        scores = {}
        for count in k:
            if all(len(group) >= count for group in passed.values()):
                rates = [_at_least_one(len(p), sum(p), count) for p in passed.values()]
                scores[f"pass@{count}"] = fmean(rates)
        return scores, passed


def runs(program: str) -> bool:
    """Whether a program comes to its end without an error in the time it has.

    Raises:
        OSError: no process could be started, of which the program knows nothing.
    """
    # A program that ends itself before its tests does not know this code.
    code = random.SystemRandom().randrange(64, 114)
    program = f"{program}\nimport os\nos._exit({code})\n"
    with tempfile.TemporaryDirectory() as folder:
        try:
            done = subprocess.run(
                [sys.executable, "-I", "-c", _RUN],
                input=program,
                text=True,
                cwd=folder,
                env={"OMP_NUM_THREADS": "1"},
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                timeout=_SECONDS,
                preexec_fn=_limit,
                errors="replace",
            )
        except subprocess.TimeoutExpired:
            return False
    return done.returncode == code


def _limit() -> None:
    """In the child, before the program: bounds that it cannot raise, and none above those of this process."""
    for what, bound in (
        (resource.RLIMIT_CPU, _SECONDS),
        (resource.RLIMIT_AS, _BYTES),
        (resource.RLIMIT_FSIZE, _FILE_BYTES),
        (resource.RLIMIT_CORE, 0),
    ):
        most = resource.getrlimit(what)[1]
        if most != resource.RLIM_INFINITY:
            bound = min(bound, most)
        resource.setrlimit(what, (bound, bound))


def _at_least_one(total: int, correct: int, k: int) -> float:
    """Chance that k of the candidates hold a correct one, without bias (arXiv 2107.03374, equation 1)."""
    return 1.0 - comb(total - correct, k) / comb(total, k)


def load(name: str, *_: Any, **__: Any) -> CodeEval:
    """In place of `evaluate.load`."""
    assert name == "code_eval", f"expected code_eval, found {name}"
    return CodeEval()
