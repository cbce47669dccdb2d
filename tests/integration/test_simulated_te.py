"""Transformer Engine's layers on a simulated device: the losses of the torch-native layers on a CPU."""

from collections.abc import Iterator

import pytest

from tests.helpers import simulated_te
from tests.helpers.entry import LOSSES, Launch, succeed
from tests.helpers.forked import Server

pytestmark = pytest.mark.skipif(
    not simulated_te.AVAILABLE,
    reason="needs torch 2.13 for CUDA, Triton, no CUDA device, and what `make setup` installs",
)

STEPS = 3
SMALL = ("--seq-length", 32, "--micro-batch-size", 2, "--global-batch-size", 8)
SMALL = (*SMALL, "--train-iters", STEPS, "--use-distributed-optimizer")
WITHIN = ("--dataloader-inter-document-masking",)
TENSOR_PARALLEL = ("--tensor-model-parallel-size", 2, "--sequence-parallel")
OFFLOADED = ("--reference-offload", "--reference-hidden-offload", "--recompute-activations")
EXPERTS = ("--num-experts", 4, "--moe-ffn-hidden-size", 40, "--moe-layer-freq", "[0,1]*2")
GROUPED = (*EXPERTS, "--moe-grouped-gemm", "--moe-token-dispatcher-type", "alltoall")
# fp32 sums in another order, and bf16 rounds a layer's output by 4e-3.
TOLERANCE = {
    "plain": 1e-5,
    "unlearning, offloaded": 1e-5,
    "unlearning, TP 2": 1e-5,
    "within documents": 1e-5,
    "within documents, TP 2": 1e-5,
    "within documents, PP 2": 1e-5,
    "within documents, CP 2, bf16": 2e-2,
    "within documents, experts": 1e-5,
}
# Their weights are drawn in another order: each kind of layers starts elsewhere.
ELSEWHERE = "experts in one product, EP 2"
PLAIN = ("plain", "within documents, experts", ELSEWHERE)


@pytest.fixture(scope="module")
def launches(tiny):
    """By name, runs of either kind of layers."""
    unlearn = tiny.unlearn(*SMALL, "--forget-batch-size", 4)
    within = (*unlearn, *WITHIN)
    context_parallel = ("--context-parallel-size", 2, "--bf16")
    return {
        "plain": Launch(tiny.plain(*SMALL)),
        "unlearning, offloaded": Launch((*unlearn, *OFFLOADED)),
        "unlearning, TP 2": Launch((*unlearn, *TENSOR_PARALLEL), ranks=2),
        "within documents": Launch((*within, "--recompute-activations")),
        "within documents, TP 2": Launch((*within, *TENSOR_PARALLEL), ranks=2),
        "within documents, PP 2": Launch((*within, "--pipeline-model-parallel-size", 2), ranks=2),
        "within documents, CP 2, bf16": Launch((*within, *context_parallel), ranks=2),
        "within documents, experts": Launch(tiny.plain(*SMALL, *WITHIN, *EXPERTS)),
        ELSEWHERE: Launch(tiny.plain(*SMALL, *GROUPED, "--expert-model-parallel-size", 2), ranks=2),
    }


@pytest.fixture(scope="module")
def simulated() -> Iterator[Server]:
    """Starts runs with Transformer Engine."""
    server = Server("tests.helpers.simulated_te")
    yield server
    server.close()


@pytest.fixture(scope="module")
def native(launches, server, runs_directory):
    """Each run of the torch-native layers."""
    return server.run_all(launches, runs_directory / "simulated te" / "native")


@pytest.fixture(scope="module")
def te(launches, simulated, runs_directory):
    """Each run of Transformer Engine's."""
    return simulated.run_all(launches, runs_directory / "simulated te" / "te")


@pytest.mark.parametrize("name", TOLERANCE)
def test_losses_are_those_of_the_torch_native_layers(te, native, name):
    assert te[name].line("NVIDIA H200") == "NVIDIA H200: Transformer Engine"
    assert "no CUDA device" in native[name].output
    for tag in (*(("lm loss",) if name in PLAIN else LOSSES), "grad-norm"):
        found = te[name].series(tag)
        assert len(found) == STEPS
        assert found == pytest.approx(native[name].series(tag), rel=TOLERANCE[name], abs=1e-6), tag


def test_documents_make_a_difference(te):
    """Or the comparison would not see that one kind of layers attends across them."""
    across, within = (
        te[name].series("grad-norm") for name in ("unlearning, TP 2", "within documents")
    )
    assert all(abs(one / other - 1) > 1e-2 for one, other in zip(across, within, strict=True))


@pytest.mark.parametrize("name", ["within documents", "within documents, experts", ELSEWHERE])
@pytest.mark.parametrize("first", ["native", "te"])
def test_each_goes_on_from_the_others_checkpoint(
    first, name, launches, native, te, simulated, server, tiny, tmp_path
):
    """Weights, and what the optimizer keeps, which the last step shows, after the first of three."""
    straight = {"native": native, "te": te}[first][name]
    flags = (*launches[name].arguments, "--dist-ckpt-optim-fully-reshardable")
    kept = ("--save", tmp_path / "kept", "--save-interval", 1)
    load = ("--load", tmp_path / "kept")
    if name not in PLAIN:
        flags = tuple(flag for flag in flags if flag not in ("--finetune", "--load", tiny.base))
        start, load = ("--pretrained-checkpoint", tiny.base), (*load, *kept)
        flags = (*flags, *start)
    starts = {"native": server, "te": simulated}
    ranks = launches[name].ranks
    half = Launch((*flags, *kept, "--exit-interval", 1), ranks)
    half = starts.pop(first).run(half, tmp_path / "half")
    assert half.returncode == 0, half.output[-4000:]
    (other,) = starts.values()
    rest = other.run(Launch((*flags, *load), ranks), tmp_path / "rest")
    assert rest.returncode == 0, rest.output[-4000:]
    for tag in (*(("lm loss",) if name in PLAIN else LOSSES), "grad-norm"):
        found = rest.series(tag)
        assert found == pytest.approx(straight.series(tag)[1:], rel=1e-5, abs=1e-6), tag


@pytest.fixture(scope="module")
def aware(tiny, simulated, tmp_path_factory):
    """Flags of runs in bf16 that go on from the first of three steps of the precision-aware optimizer."""
    directory = tmp_path_factory.mktemp("aware")
    flags = (*SMALL, "--bf16", "--dist-ckpt-optim-fully-reshardable", "--forget-batch-size", 4)
    flags = tiny.objective(*flags, "--pretrained-checkpoint", tiny.base)
    save = ("--save", directory / "kept", "--save-interval", 1, "--exit-interval", 1)
    half = Launch((*flags, "--use-precision-aware-optimizer", *save))
    half = simulated.run(half, directory / "half")
    assert half.returncode == 0, half.output[-4000:]
    straight = succeed(simulated.run(Launch(flags), directory / "straight"))
    return (*flags, "--load", directory / "kept"), straight


@pytest.mark.parametrize(
    ("optimizer", "ranks"), [("precision-aware", 1), ("precision-aware", 2), ("plain", 1)]
)
def test_a_checkpoint_of_the_precision_aware_optimizer_has_fp32_weights(
    aware, optimizer, ranks, simulated, tmp_path
):
    """In Megatron it has the bits that bf16 lacks in their place, for which no run has a use."""
    flags, straight = aware
    more = () if optimizer == "plain" else ("--use-precision-aware-optimizer",)
    rest = succeed(simulated.run(Launch((*flags, *more), ranks), tmp_path))
    for tag in (*LOSSES, "grad-norm"):
        # Ranks add gradients in another order.
        assert rest.series(tag) == pytest.approx(straight.series(tag)[1:], rel=1e-5), tag


FP8 = {
    "tensorwise": ("--fp8-recipe", "tensorwise"),
    "delayed": ("--fp8-amax-history-len", 16, "--fp8-amax-compute-algo", "max"),
}
# e4m3 keeps 3 bits behind the point. The scales of a first step are 1, and little of its gradients is left.
NOISE = {"loss": 2e-2, "mitigation kl": 5e-2, "grad-norm": 6e-2}
FIRST = {"tensorwise": 0, "delayed": 1}


@pytest.fixture(scope="module")
def fp8(tiny, simulated, tmp_path_factory):
    """Runs in bf16 and fp8 that hardly move, and the flags that go on from the first step of one in fp8."""
    directory = tmp_path_factory.mktemp("fp8")
    still = ("--lr", 1e-6, "--min-lr", 1e-6, "--forget-weight", 0.01)
    flags = tiny.objective(*SMALL, "--bf16", "--forget-batch-size", 4, *still)
    flags = (*flags, "--reference-load", tiny.reference, "--pretrained-checkpoint", tiny.base)
    launches = {"bf16": Launch(flags)}
    for name, more in FP8.items():
        own = (*flags, "--fp8-format", "hybrid", *more)
        kept = ("--save", directory / name, "--save-interval", 1)
        launches[name] = Launch(own)
        launches[f"half of {name}"] = Launch((*own, *kept, "--exit-interval", 1))
    # Megatron warns of what it switches off for a recipe.
    runs = {name: simulated.run(one, directory / "logs" / name) for name, one in launches.items()}
    assert not any(run.returncode for run in runs.values()), runs
    return runs, {name: (*launches[name].arguments, "--load", directory / name) for name in FP8}


@pytest.mark.parametrize("recipe", FP8)
def test_fp8_trains_to_what_bf16_does(fp8, recipe):
    """Forgotten and replayed microbatches, whose gradients are of different sizes, in one step."""
    runs, _ = fp8
    for tag in (*LOSSES, "grad-norm"):
        bound = NOISE.get(tag, NOISE["loss"])
        found, expected = (
            runs[name].series(tag)[FIRST[recipe] if tag == "grad-norm" else 0 :]
            for name in (recipe, "bf16")
        )
        assert found == pytest.approx(expected, rel=bound), tag
        assert found != expected, tag


@pytest.mark.parametrize("recipe", FP8)
def test_fp8_goes_on_from_its_scales(fp8, recipe, simulated, tmp_path):
    """Those of delayed scaling are pickled, which Transformer Engine alone refuses to read."""
    runs, flags = fp8
    rest = simulated.run(Launch(flags[recipe]), tmp_path)
    assert rest.returncode == 0, rest.output[-4000:]
    for tag in (*LOSSES, "grad-norm"):
        assert rest.series(tag) == runs[recipe].series(tag)[1:], tag
