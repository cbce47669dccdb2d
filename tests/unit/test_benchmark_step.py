"""What `benchmarks.step` runs on a GPU, as far as a CPU can tell."""

import json
import subprocess
import sys

import pytest

from tests.helpers.entry import ROOT

# In a process of its own: the CPU runtime changes torch for good.
STEPS = """
import json
from dataclasses import replace

from benchmarks import step, step_models
from benchmarks.step_variants import SMALL, Variant

step._start_megatron("cpu")
tiny = replace(SMALL, layers=1, hidden=32, ffn=64, heads=4, vocab=64, sequence=16)
plain, unlearn = Variant("plain", native=True), Variant("unlearn", native=True, unlearn=True)
build = step_models._config

def config(shape, variant, *, fused):
    made = build(shape, variant)
    made.gradient_accumulation_fusion = fused
    return made

losses = []
for fused in (False, True):
    step_models._config = lambda *given, fused=fused: config(*given, fused=fused)
    trainer = step_models.Trainer(tiny, plain)
    assert trainer.config.gradient_accumulation_fusion is fused
    turns = (trainer, trainer.sibling(unlearn))
    losses.append([turn.step() for turn in (*turns, *turns)])
print(json.dumps(losses))
"""


def test_variants_take_turns_with_fused_gradients_as_without():
    """Those are on on a GPU, and Megatron's layers refuse them outside of the variant's own kernels."""
    done = subprocess.run(
        [sys.executable, "-c", STEPS], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    alone, fused = json.loads(done.stdout.splitlines()[-1])
    assert len(set(alone)) == 4
    assert fused == pytest.approx(alone, rel=1e-5)
