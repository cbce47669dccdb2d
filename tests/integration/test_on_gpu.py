"""The entry point on a GPU: the losses of the same machine's CPU, from start over resume to export."""

import json
import os
import subprocess
import sys
from unittest import mock

import pytest
import torch

from tests.helpers.entry import LOSSES, METRICS, ROOT, Launch, run, succeed

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

STEPS, HALF = 6, 3
TRAIN = ("--train-iters", STEPS, "--eval-interval", HALF, "--eval-iters", 1)
SHARDED = ("--use-distributed-optimizer", "--dist-ckpt-optim-fully-reshardable")
OVERLAPS = ("--overlap-grad-reduce", "--overlap-param-gather")
OFFLOADS = ("--reference-offload", "--reference-hidden-offload")
# fp32 products of a GPU sum in another order, and six steps at this learning rate carry that on; bf16
# rounds each layer's output by 4e-3.
FP32, BF16 = 1e-3, 3e-2
TOLERANCE = {"plain": FP32, "unlearning": FP32, "offloads": FP32}
TOLERANCE |= {"bf16": BF16, "offloads, bf16": BF16}
PLACES = {"gpu": {}, "cpu": {"CUDA_VISIBLE_DEVICES": ""}}
# Ranks, a GPU each, and flags; what is left of the ranks is data parallelism.
LAYOUTS = {
    "DP 2": (2, *OVERLAPS),
    "TP 2": (2, "--tensor-model-parallel-size", 2, "--sequence-parallel"),
    "PP 2": (2, "--pipeline-model-parallel-size", 2),
    "CP 2": (2, "--context-parallel-size", 2),
    "TP 2, PP 2, offloads": (
        *(4, "--tensor-model-parallel-size", 2, "--sequence-parallel", *OFFLOADS),
        *("--pipeline-model-parallel-size", 2, "--num-virtual-stages-per-pipeline-rank", 2),
    ),
}


@pytest.fixture(scope="module")
def launches(tiny, runs_directory):
    """By name; `unlearning` saves, and in the background."""
    unlearn = tiny.unlearn(*TRAIN)
    save = ("--save", runs_directory / "gpu-save", "--save-interval", HALF, "--async-save")
    return {
        "plain": Launch(tiny.plain(*TRAIN)),
        "unlearning": Launch((*unlearn, *SHARDED, *save)),
        "offloads": Launch((*unlearn, *SHARDED, *OFFLOADS)),
        "bf16": Launch((*unlearn, *SHARDED, *OVERLAPS, "--bf16")),
        "offloads, bf16": Launch((*unlearn, *SHARDED, *OVERLAPS, *OFFLOADS, "--bf16")),
    }


@pytest.fixture(scope="module")
def on_gpu(launches, runs_directory):
    """Each run on the GPU, one after another."""
    directory = runs_directory / "gpu"
    return {name: succeed(run(launch, directory / name), name) for name, launch in launches.items()}


@pytest.fixture(scope="module")
def on_cpu(tiny, runs_directory):
    """The same steps with the GPU hidden, in fp32."""
    runs = {"plain": tiny.plain(*TRAIN), "unlearning": tiny.unlearn(*TRAIN)}
    with mock.patch.dict(os.environ, PLACES["cpu"]):
        return {
            name: succeed(run(Launch(flags), runs_directory / "gpu-cpu" / name), name)
            for name, flags in runs.items()
        }


@pytest.mark.parametrize("name", TOLERANCE)
def test_losses_are_those_of_the_cpu(on_gpu, on_cpu, name):
    expected = on_cpu["plain" if name == "plain" else "unlearning"]
    assert "no CUDA device" in expected.output
    assert "no CUDA device" not in on_gpu[name].output
    tags = ("lm loss", "grad-norm") if name == "plain" else (*LOSSES, "grad-norm")
    for tag in tags:
        found = on_gpu[name].series(tag)
        assert len(found) == STEPS
        assert found == pytest.approx(expected.series(tag), rel=TOLERANCE[name], abs=1e-5), tag


@pytest.mark.parametrize(
    ("offloaded", "plain"), [("offloads", "unlearning"), ("offloads, bf16", "bf16")]
)
def test_offloads_change_no_loss(on_gpu, offloaded, plain):
    assert on_gpu[offloaded].digest() == on_gpu[plain].digest()
    for tag in METRICS:
        # Reductions by atomic additions may round otherwise from run to run.
        found, expected = on_gpu[offloaded].series(tag), on_gpu[plain].series(tag)
        assert found == pytest.approx(expected, rel=TOLERANCE[plain]), tag


@pytest.mark.parametrize("place", PLACES)
def test_goes_on_from_a_background_save(on_gpu, tiny, runs_directory, place):
    flags = tiny.objective(
        *(*TRAIN, *SHARDED, "--load", runs_directory / "gpu-save", "--ckpt-step", HALF)
    )
    with mock.patch.dict(os.environ, PLACES[place]):
        resumed = succeed(run(Launch(flags), runs_directory / "gpu-resumed" / place), place)
    assert resumed.digest() == on_gpu["unlearning"].digest()
    for tag in (*LOSSES, "grad-norm"):
        expected = on_gpu["unlearning"].series(tag)[HALF:]
        assert resumed.series(tag) == pytest.approx(expected, rel=FP32, abs=1e-5), tag


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts_over_nccl_train_to_the_same_losses(tiny, on_cpu, runs_directory, name):
    ranks, *flags = LAYOUTS[name]
    if torch.cuda.device_count() < ranks:
        pytest.skip(f"needs {ranks} CUDA devices")
    launch = Launch(tiny.unlearn(*TRAIN, *SHARDED, *flags), ranks=ranks)
    found = succeed(run(launch, runs_directory / "nccl" / name), name)
    for tag in (*LOSSES, "grad-norm"):
        expected = on_cpu["unlearning"].series(tag)
        assert found.series(tag) == pytest.approx(expected, rel=FP32, abs=1e-5), tag


@pytest.fixture(scope="module")
def read(on_gpu, tiny, runs_directory):
    """What the tools make of a checkpoint of the GPU, there and with the GPU hidden."""
    directory = runs_directory / "gpu-tools"
    directory.mkdir()
    (directory / "prompts.jsonl").write_text('{"prompt": "Question: what is 3 + 4?"}\n')
    save = runs_directory / "gpu-save"
    tools = {
        "perplexity": ("analyze.py", "perplexity", "--checkpoint", save, "--samples", 20)
        + ("--data", f"pairs={tiny.forget}", "--tokenizer-model", tiny.tokenizer),
        "text": ("generate.py", "--model", save, "--input", directory / "prompts.jsonl")
        + ("--max-new-tokens", 8, "--tokenizer-model", tiny.tokenizer),
    }
    found = {}
    for place in PLACES:
        for name, (tool, *arguments) in tools.items():
            output = directory / f"{name}-{place}.json"
            command = [sys.executable, ROOT / "tools" / tool, *arguments, "--output", output]
            done = subprocess.run(
                [str(word) for word in command],
                cwd=ROOT,
                env=os.environ | PLACES[place],
                capture_output=True,
                text=True,
            )
            assert done.returncode == 0, done.stderr
            found[name, place] = json.loads(output.read_text())
    return found


def test_perplexities_are_those_of_the_cpu(read):
    sets = [next(iter(read["perplexity", place]["models"].values()))["sets"] for place in PLACES]
    gpu, cpu = (found["pairs"]["loss"] for found in sets)
    assert len(gpu) == 20
    assert gpu == pytest.approx(cpu, rel=1e-4)


def test_greedy_text_is_that_of_the_cpu(read):
    assert read["text", "gpu"]["tokens"] == read["text", "cpu"]["tokens"]
    assert read["text", "gpu"]["completion"] == read["text", "cpu"]["completion"]
