"""The README's Python runs as it stands, and make does what its first lines say."""

import os
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional

from tests.helpers.entry import ROOT
from tests.helpers.recipes import after, executable
from tests.unit.test_plan import write_index

# What the import writes of Llama 3 8B; its vocabulary stands in for the tokenizer.
LLAMA_3_8B = """--num-layers 32 --hidden-size 4096 --ffn-hidden-size 14336 --num-attention-heads 32
--kv-channels 128 --max-position-embeddings 8192 --position-embedding-type rope --rotary-base 500000
--normalization RMSNorm --norm-epsilon 1e-05 --swiglu --group-query-attention --num-query-groups 8
--disable-bias-linear --untie-embeddings-and-output-weights --attention-dropout 0.0 --hidden-dropout 0.0
--seq-length 4096 --vocab-size 128256 --bf16"""


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


@pytest.fixture
def commands(tmp_path):
    """Runs a block of the README; of its commands the plan alone is real."""
    for folder, file in (("ckpt/start", "ARGS.txt"), ("tools", "plan_run.py")):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / file).write_text(LLAMA_3_8B)
    (tmp_path / "data").mkdir()
    for name, documents in (("web", 1000), ("qa", 100)):
        write_index(tmp_path / f"data/{name}_text_document", 10**7 * documents, documents)
    plan = f'exec {sys.executable} {ROOT}/"$@"'
    executable(tmp_path / "python", f'case $1 in *plan_run.py) {plan} ;; esac; echo "$1 $2"')
    executable(tmp_path / "torchrun", 'printf "%s\\n" started "$@"')

    def run(block: str, more: str = "") -> str:
        done = subprocess.run(
            ["bash", "-euc", block + more],
            env={"PATH": f"{tmp_path}:{os.environ['PATH']}"},
            **{"cwd": tmp_path, "text": True, "capture_output": True},
        )
        assert (done.returncode, done.stderr) == (0, "")
        return done.stdout

    return run


def test_the_run_of_a_hugging_face_model_is_planned_and_fits(commands):
    """It asked for 228 GiB of each GPU."""
    text = (ROOT / "README.md").read_text()
    [block] = re.findall(
        r"```\n(python tools/convert_checkpoint\.py import.*?)```", text, re.DOTALL
    )
    plan, _, run = commands(block).partition("started\n")
    assert "8,030,261,248" in plan
    assert "81% of H100's 80 GB" in plan
    assert "1 of them 112.42 GB" in plan
    assert "WARNING" not in plan
    words = run.splitlines()
    assert after(words, "--nproc-per-node") == ["8", "pretrain_unlearn.py"]
    assert after(words, "--eval-iters") == ["10"]
    assert words[-2:] == ["--use-distributed-optimizer", "tools/convert_checkpoint.py export"]
    assert "60.7 GiB of each H100's 74.5, and a checkpoint 112 GB" in text
    assert "  60.70\n" in plan


def test_the_chat_tuning_of_a_hugging_face_model_fits(commands):
    """The command was not written out."""
    [block] = re.findall(r"```\n(tune=.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    out = commands(block, '\npython tools/plan_run.py --gpus 8 -- "${tune[@]}"')
    words, plan = out[: out.index("parameters ")].splitlines(), out[out.index("parameters ") :]
    assert after(words, "--pretrained-checkpoint") == ["ckpt/unlearn"]
    assert "2 epochs, 262,144 tokens a step" in plan
    assert "WARNING" not in plan
