"""A mixture-of-experts model is trained and unlearned alike under every layout.

The layers themselves are compared with Megatron's local spec in test_model_spec.py. Routing has no
balancing loss here, unless a test is about it: Megatron computes that for each microbatch of a rank, so it
depends on the layout by its definition.
"""

import pytest

from megatron_ext.analysis.scalars import compare
from tests.helpers.entry import METRICS, Launch
from tests.helpers.tiny import at_iteration

# fp32, summed in another order behind 4 layers; 4e-7 was seen.
TOLERANCE = 1e-5
STEPS, HALF = 4, 2
# The first layer is dense, as in models of today.
MODEL = (
    *("--num-experts", 4, "--moe-layer-freq", "[0,1,1,1]", "--moe-router-topk", 2),
    *("--moe-ffn-hidden-size", 40, "--moe-shared-expert-intermediate-size", 24),
    *("--moe-token-dispatcher-type", "alltoall", "--moe-router-dtype", "fp32"),
)
UNBALANCED = ("--moe-router-load-balancing-type", "none")
BALANCED = (
    *("--moe-router-load-balancing-type", "aux_loss", "--moe-aux-loss-coeff", 0.1),
    *("--moe-z-loss-coeff", 0.01),
)
TRAIN = (
    *("--train-iters", STEPS, "--lr", 1e-3, "--min-lr", 1e-4, "--eval-interval", HALF),
    *("--eval-iters", 2, "--save-interval", HALF),
)
EXPERTS = ("--expert-model-parallel-size", 2)
SHARDED = ("--use-distributed-optimizer", "--dist-ckpt-optim-fully-reshardable")
SAVED = "EP 2, distributed optimizer, overlapped"
LAYOUTS: dict[str, tuple[int, tuple[object, ...]]] = {
    SAVED: (
        2,
        (*EXPERTS, *SHARDED, "--overlap-grad-reduce", "--overlap-param-gather"),
    ),
    "EP 2 x TP 2, sequence parallel, one product": (
        4,
        (*EXPERTS, "--tensor-model-parallel-size", 2, "--sequence-parallel")
        + ("--expert-tensor-parallel-size", 1, "--moe-grouped-gemm"),
    ),
    "CP 2": (2, ("--context-parallel-size", 2)),
    "interleaved PP 2": (
        2,
        ("--pipeline-model-parallel-size", 2, "--num-layers-per-virtual-pipeline-stage", 1),
    ),
}


@pytest.fixture(scope="module")
def runs(tiny, server, runs_directory):
    """A model from scratch; unlearned on one rank and under each layout; resumed under another."""
    directory = runs_directory / "experts"
    base = directory / "base"
    start = ("--train-iters", 10, "--save", base, "--save-interval", 5)
    launch = Launch(tiny.plain(*start, *MODEL, *UNBALANCED))
    server.run_all({"base": launch}, directory / "tensorboard_base")
    reference = at_iteration(base, 5, directory / "reference")
    unlearn = (*TRAIN, "--load", base, "--finetune", "--reference-load", reference, *MODEL)
    launches = {"one rank": Launch(tiny.objective(*unlearn, *UNBALANCED))}
    for name, (ranks, layout) in LAYOUTS.items():
        save = ("--save", directory / "saved") if name == SAVED else ()
        launches[name] = Launch(tiny.objective(*unlearn, *UNBALANCED, *layout, *save), ranks=ranks)
    balanced = tiny.objective(*unlearn, *BALANCED)
    launches["balanced"] = Launch(balanced)
    launches["balanced, no reference"] = Launch((*balanced, "--mitigation-weight", 0))
    found = server.run_all(launches, directory / "tensorboard")
    halfway = at_iteration(directory / "saved", HALF, directory / "halfway")
    rest = tiny.objective(*TRAIN, *MODEL, *UNBALANCED, *SHARDED, "--load", halfway)
    layout = ("--expert-model-parallel-size", 4, "--micro-batch-size", 1)
    resumed = Launch((*rest, *layout), ranks=4)
    return found | server.run_all({"resumed at EP 4": resumed}, directory / "tensorboard_rest")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_steps_and_validations_do_not_depend_on_the_layout(runs, layout):
    tags = ("grad-norm", *METRICS, *(f"{tag} validation" for tag in METRICS))
    expected, found = runs["one rank"].scalars, runs[layout].scalars
    assert len(expected["unlearn loss"]) == STEPS
    assert min(expected["mitigation kl"].values()) > 0.01
    for tag, difference in compare(expected, found, tags=tags).items():
        assert difference < TOLERANCE, tag


def test_a_run_goes_on_with_its_experts_on_other_ranks(runs):
    expected = {
        tag: {step: value for step, value in runs["one rank"].scalars[tag].items() if step > HALF}
        for tag in ("grad-norm", *METRICS)
    }
    assert len(expected["unlearn loss"]) == STEPS - HALF
    found = runs["resumed at EP 4"].scalars
    for tag, difference in compare(expected, found, tags=list(expected)).items():
        assert difference < TOLERANCE, tag


def test_the_reference_has_one_digest_wherever_its_experts_are(runs):
    with_reference = [run for name, run in runs.items() if name != "balanced, no reference"]
    assert len({run.digest() for run in with_reference}) == 1


def test_balancing_acts_on_the_gradient_and_the_reference_has_no_part_in_it(runs):
    first = {
        name: {tag: s[1] for tag, s in run.scalars.items() if 1 in s} for name, run in runs.items()
    }
    for tag in METRICS:  # the same weights, so the same terms of the objective
        assert first["balanced"][tag] == pytest.approx(first["one rank"][tag], rel=TOLERANCE)
    difference = first["balanced"]["grad-norm"] / first["one rank"]["grad-norm"] - 1
    assert abs(difference) > 1e-3
    alone = first["balanced, no reference"]
    for tag in ("load_balancing_loss", "z_loss"):
        assert first["balanced"][tag] == pytest.approx(alone[tag], rel=TOLERANCE)
        assert alone[tag] > 0
