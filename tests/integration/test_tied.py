"""Tied embeddings: the output layer's weight is the input embedding's, on another pipeline stage too."""

from types import SimpleNamespace

import pytest

from megatron_ext.analysis.scalars import compare
from tests.helpers import naive_gpt
from tests.helpers.entry import LOSSES, Launch
from tests.helpers.tiny import BATCH, FORGET, SEQUENCE, VOCAB, at_iteration

TAGS = (*LOSSES, "grad-norm")
LAYOUTS = {
    "one rank": (1, ()),
    "TP 2": (2, ("--tensor-model-parallel-size", 2)),
    "PP 2": (2, ("--pipeline-model-parallel-size", 2)),
}


def tied(flags):
    return tuple(flag for flag in flags if flag != "--untie-embeddings-and-output-weights")


@pytest.fixture(scope="module")
def base(tiny, server, tmp_path_factory):
    """A tied model after 8 steps, and its reference: the same after 4."""
    directory = tmp_path_factory.mktemp("tied")
    flags = tiny.plain("--train-iters", 8, "--save-interval", 4, "--save", directory / "saved")
    server.run_all({"base": Launch(tied(flags))}, directory)
    return directory / "saved", at_iteration(directory / "saved", 4, directory / "reference")


@pytest.fixture(scope="module")
def runs(tiny, server, base, runs_directory):
    """Three steps of unlearning on each layout."""
    start = ("--load", base[0], "--finetune", "--reference-load", base[1])
    flags = tied(tiny.objective(*start, "--train-iters", 3, "--lr", 1e-3))
    launches = {name: Launch((*flags, *more), ranks=n) for name, (n, more) in LAYOUTS.items()}
    return server.run_all(launches, runs_directory / "tied")


def test_a_tied_checkpoint_has_no_output_layer(base):
    weights = naive_gpt.load_weights(str(base[0]))
    assert "embedding.word_embeddings.weight" in weights
    assert "output_layer.weight" not in weights


def test_the_first_step_agrees_with_the_naive_computation(tiny, base, runs):
    """The embedding's gradient is the sum of both of its uses; naive autograd adds them up by itself."""
    weights, reference = (naive_gpt.load_weights(str(directory)) for directory in base)
    spec = SimpleNamespace(
        **{"batch": BATCH, "forget": FORGET, "sequence": SEQUENCE, "split": "90,10,0", "eod": 2},
        **{"heads": 4, "groups": 2, "vocab": VOCAB, "weights": [0.5, 0.7, 1.3]},
        forget_loss="bounded",
    )
    forget, _ = naive_gpt.samples(str(tiny.forget), [FORGET, 0], spec)
    replay, _ = naive_gpt.samples(str(tiny.replay), [BATCH - FORGET, 0], spec)
    batch = naive_gpt.global_batch(forget, replay, 0, spec)
    terms = naive_gpt.token_terms(weights, reference, batch, spec)
    expected = naive_gpt.report(naive_gpt.means(terms, batch), weights, spec)
    for tag in TAGS:
        # fp32 against fp64.
        assert runs["one rank"].scalars[tag][1] == pytest.approx(expected[tag], rel=1e-5), tag


@pytest.mark.parametrize("layout", ["TP 2", "PP 2"])
def test_every_layout_learns_the_same(runs, layout):
    expected = runs["one rank"].scalars
    assert len(expected["unlearn loss"]) == 3
    assert min(expected["mitigation kl"].values()) > 1e-3
    for tag, difference in compare(expected, runs[layout].scalars, tags=TAGS).items():
        assert difference < 1e-5, tag
