"""The README's Python runs as it stands, and make does what its first lines say."""

import os
import re
import subprocess
from types import SimpleNamespace

import torch
from torch import nn
from torch.nn import functional

from tests.helpers.entry import ROOT


def test_the_loss_in_a_loop_of_ones_own_is_the_objective():
    [code] = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    torch.manual_seed(3)
    model, reference = (SimpleNamespace(lm_head=nn.Linear(16, 50, bias=False)) for _ in range(2))
    hidden = torch.randn(12, 16, requires_grad=True)
    scope = {
        "model": model,
        "reference": reference,
        "hidden": hidden,
        "reference_hidden": torch.randn(12, 16),
        "labels": torch.randint(0, 50, (12,)),
        "roles": torch.tensor([-1] * 4 + [0] * 2 + [1] * 6),
    }
    exec(code, scope)

    states = hidden.detach().double().requires_grad_()
    logits = states @ model.lm_head.weight.detach().double().T
    log_p = functional.log_softmax(logits, -1)
    with torch.no_grad():
        before = scope["reference_hidden"].double() @ reference.lm_head.weight.double().T
    log_q = functional.log_softmax(before, -1)
    of_label = log_p.gather(1, scope["labels"][:, None])[:, 0]
    expected = (
        0.01 * -torch.log1p(-of_label[:4].exp()).mean()
        - of_label[6:].mean()
        + (log_q.exp() * (log_q - log_p))[6:].sum(-1).mean()
    )
    expected.backward()
    torch.testing.assert_close(scope["loss"].double(), expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(hidden.grad.double(), states.grad, rtol=1e-4, atol=1e-6)


def dry_run(target):
    """What make would do; this may run under a make of its own."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("MAKE", "MFLAGS"))}
    done = subprocess.run(
        ["make", "--dry-run", target], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, ""), target
    return done.stdout.splitlines()


def test_every_command_of_make_is_what_it_says():
    """Of two recipes for a target make takes the last, with a warning that nobody reads in CI."""
    told = re.findall(r"^# make ([a-z-]+) ", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert {"demo", "sweep", "test", "check", "slurm-test", "setup"} <= set(told)
    commands = {target: dry_run(target) for target in told}
    assert commands["test"][-1] == commands["check"][-1]
    assert commands["test"][-1].startswith(".venv/bin/python -m pytest --numprocesses auto ")
