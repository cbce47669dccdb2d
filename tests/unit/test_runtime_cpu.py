"""The CPU runtime: nothing where a device exists, idempotent where none does."""

import json
import os
import subprocess
import sys

import pytest
import torch

from tests.helpers.entry import ROOT

ANALYSIS = ("--data", "a=none", "--tokenizer-model", "none", "--output", "none.json")
# Run in processes of their own: the runtime changes torch for good.
SNAPSHOT = """
import gc, json, logging, os, sys
gc.disable()
import torch
import torch.cuda, torch.distributed, torch._dynamo.config

def snapshot():
    places = {
        "torch": torch, "torch.cuda": torch.cuda, "torch.cuda.random": torch.cuda.random,
        "Tensor": torch.Tensor, "Module": torch.nn.Module, "dynamo": torch._dynamo.config._config,
    }
    found = {}
    for place, owner in places.items():
        items = owner.items() if isinstance(owner, dict) else vars(owner).items()
        found |= {f"{place}.{name}": id(value) for name, value in items if name != "__builtins__"}
    filters = [name for name in NAMES if logging.getLogger(name).filters]
    hidden = [name for name, module in sys.modules.items() if module is None]
    return found | {"environment": dict(os.environ), "filters": filters, "hidden": hidden}

NAMES = ("megatron.core.tensor_parallel.random", "torch.utils.cpp_extension")
"""


def run(program: str, **environment: str) -> dict:
    result = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        env=os.environ | environment,
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


ENABLE = """
import torch
torch.cuda.is_available = lambda: {available}
from megatron_ext.runtime import cpu
"""
CHANGES = """
before = snapshot()
enabled = cpu.enable()
after = snapshot()
changed = sorted(key for key in before | after if before.get(key) != after.get(key))
"""
TWICE = f"""
{CHANGES}
megatron = "megatron.training.training" in sys.modules
first = {{"enabled": enabled, "changed": changed, "megatron": megatron}}
{CHANGES}
with torch.device("meta"):
    device = str(torch.arange(3).device)
print(json.dumps({{"first": first, "second": {{"enabled": enabled, "changed": changed}}, "device": device}}))
"""


@pytest.fixture(scope="module")
def switched_on():
    """What `enable` changes when it is called twice, and a factory under a default device then."""
    return run(SNAPSHOT + ENABLE.format(available=False) + TWICE)


def test_nothing_changes_where_a_device_exists():
    result = run(SNAPSHOT + ENABLE.format(available=True) + TWICE)
    assert result["first"] == {"enabled": False, "changed": [], "megatron": False}
    assert result["second"] == {"enabled": False, "changed": []}


def test_the_same_comparison_sees_the_changes_where_there_is_none(switched_on):
    result = switched_on["first"]
    assert result["enabled"]
    assert result["megatron"]
    for name in ("torch.cuda.device_count", "Tensor.cuda", "torch.zeros", "filters", "hidden"):
        assert name in result["changed"]


def test_a_second_call_changes_nothing(switched_on):
    assert switched_on["second"] == {"enabled": True, "changed": []}


def test_a_default_device_still_acts_on_the_factories(switched_on):
    """Models of transformers are built under one; with the CPU's factories it must not be lost."""
    assert switched_on["device"] == "meta"


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("torch.device('cuda', 1)", "cpu"),
        ("'cuda:0'", "cpu"),
        ("3", "cpu"),
        ("torch.device('meta')", "meta"),
        ("True", "True"),  # non_blocking, not a device
        ("torch.bfloat16", "torch.bfloat16"),
        ("None", "None"),
    ],
)
def test_only_what_names_a_cuda_device_becomes_the_cpu(value, expected):
    from megatron_ext.runtime.cpu import _on_cpu

    assert str(_on_cpu(eval(value, {"torch": torch}))) == expected


def test_nothing_is_compiled_and_neither_a_compiler_nor_transformers_imported_unasked():
    """Also not by what keeps a function from being compiled, as `transformers` does with its own."""
    result = run(
        ENABLE.format(available=False) + "import json, sys\n"
        # In the process that writes checkpoints this comes before the CPU answers.
        "import megatron_ext.runtime.async_writer\n"
        "found = {'early': 'megatron.core' in sys.modules}\n"
        "cpu.enable()\n"
        "import megatron_ext.session, megatron_ext.checkpoint.own_tokenizer\n"
        "found['transformers'] = 'transformers' in sys.modules\n"
        "def plain(x):\n    return x\n"
        "ways = (torch.compile, torch.compile(mode='default'), torch.compiler.disable,"
        " torch.compiler.disable(reason='none'))\n"
        "import megatron.core.fusions.fused_bias_swiglu, transformers.models.llama.configuration_llama\n"
        "print(json.dumps(found | {'same': [way(plain) is plain for way in ways],"
        " 'compiler': 'torch._dynamo.convert_frame' in sys.modules}))"
    )
    without = {"early": False, "transformers": False, "compiler": False}
    assert result == without | {"same": [True] * 4}


@pytest.fixture(scope="module")
def gpu_packages(tmp_path_factory):
    """A folder with packages as in a container for GPUs on a machine without one; importing them fails."""
    folder = tmp_path_factory.mktemp("packages")
    for name in ("transformer_engine", "transformer_engine_torch", "apex"):
        (folder / name).mkdir()
        (folder / name / "__init__.py").write_text("raise RuntimeError('no CUDA driver')")
    return {"PYTHONPATH": str(folder)}


def test_packages_that_need_a_device_are_not_found_where_there_is_none(gpu_packages):
    found = run(
        ENABLE.format(available=False) + "import importlib.util, json\n"
        "names = ('transformer_engine', 'transformer_engine_torch', 'apex')\n"
        "before = [importlib.util.find_spec(name) is not None for name in names]\n"
        "cpu.enable()\n"
        "after = [importlib.util.find_spec(name) is not None for name in names]\n"
        "from megatron.core.extensions import transformer_engine\n"
        "from megatron_ext.arguments import machine_defaults\n"
        "print(json.dumps({'before': before, 'after': after, 'megatron': transformer_engine.HAVE_TE,"
        " 'layers': machine_defaults()['transformer_impl']}))",
        **gpu_packages,
    )
    expected = {"before": [True] * 3, "after": [False] * 3, "megatron": False, "layers": "local"}
    assert found == expected


def test_coming_too_late_is_an_error():
    result = run(
        ENABLE.format(available=False) + "import json, sys\n"
        "from types import ModuleType\n"
        "sys.modules['apex'] = ModuleType('apex')\n"
        "try:\n    cpu.enable()\n"
        "except RuntimeError as error:\n    print(json.dumps({'error': str(error)}))"
    )
    assert result["error"].startswith("apex was imported before cpu.enable()")


@pytest.mark.parametrize(
    ("command", "code"),
    [
        (["pretrain_unlearn.py", "--help"], 0),
        (["tools/convert_checkpoint.py", "export", "--checkpoint", "none", "--output", "none"], 2),
        (["tools/generate.py", "--model", "none", "--input", "none", "--output", "none"], 2),
        (["tools/analyze.py", "perplexity", "--checkpoint", "none", *ANALYSIS], 2),
    ],
)
def test_no_program_imports_them_before(command, code, gpu_packages):
    result = subprocess.run(
        [sys.executable, *command],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | gpu_packages,
    )
    assert result.returncode == code, result.stderr
    assert "no CUDA driver" not in result.stderr
