"""Transformer Engine and the torch-native layers: the same losses, and checkpoints of each for the other."""

import importlib.util

import pytest
import torch

from tests.helpers.entry import Launch, run, succeed

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or importlib.util.find_spec("transformer_engine") is None,
        reason="needs a CUDA device and Transformer Engine",
    ),
]
# bf16 rounds each layer's output to 4e-3, in other places in each kind of layer.
TOLERANCE = 1e-2
TAGS = ("unlearn loss", "forget loss", "replay loss")
KINDS = {"native": "local", "te": "transformer_engine"}
STEPS = ("--train-iters", 4, "--eval-iters", 0, "--bf16", "--use-distributed-optimizer")
STEPS = (*STEPS, "--dist-ckpt-optim-fully-reshardable")
WITHIN = "--dataloader-inter-document-masking"


@pytest.fixture(scope="module")
def runs(tiny, runs_directory):
    """Four steps of each kind in one piece; and the last two of each from the other's first two."""
    directory = runs_directory / "kinds"
    kind = {name: ("--transformer-impl", value) for name, value in KINDS.items()}

    def start(name, flags):
        return succeed(run(Launch(flags), directory / "tensorboard" / name))

    found = {}
    for name in KINDS:
        save = ("--save", directory / name, "--save-interval", 2)
        found[name] = start(name, tiny.unlearn(*STEPS, *kind[name], *save))
        within = f"{name}, within documents"
        found[within] = start(within, tiny.unlearn(*STEPS, *kind[name], WITHIN))
    for name, other in (("native", "te"), ("te", "native")):
        load = ("--load", directory / other, "--ckpt-step", 2)
        reference = ("--reference-load", tiny.reference)
        flags = tiny.objective(*STEPS, *kind[name], *load, *reference)
        found[f"{name} from {other}"] = start(f"{name} from {other}", flags)
    return found


@pytest.mark.parametrize("more", ["", ", within documents"])
def test_both_train_to_the_same_losses(runs, more):
    for tag in TAGS:
        native, te = (runs[name + more].series(tag) for name in KINDS)
        assert len(native) == 4
        assert te == pytest.approx(native, rel=TOLERANCE), tag


@pytest.mark.parametrize(("name", "other"), [("native", "te"), ("te", "native")])
def test_each_goes_on_from_the_others_checkpoint(runs, name, other):
    for tag in TAGS:
        resumed = runs[f"{name} from {other}"].series(tag)
        assert len(resumed) == 2
        assert resumed == pytest.approx(runs[other].series(tag)[2:], rel=TOLERANCE), tag
