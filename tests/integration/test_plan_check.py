"""`plan_run.py --check`: the plan against what Megatron builds on a rank, to the byte."""

import pytest

from megatron_ext.planning.check import _replaced
from tests.helpers.entry import ROOT, Launch
from tests.helpers.forked import Server
from tests.unit.test_plan import write_index

# Sizes that are no multiples of 64, so that every padding of a buffer is seen.
MODEL = (
    *("--num-layers", 8, "--hidden-size", 96, "--ffn-hidden-size", 200),
    *("--num-attention-heads", 4, "--seq-length", 64, "--max-position-embeddings", 64),
    *("--position-embedding-type", "rope", "--normalization", "RMSNorm", "--swiglu"),
    *("--disable-bias-linear", "--hidden-dropout", 0, "--attention-dropout", 0),
    *("--vocab-size", 501, "--make-vocab-size-divisible-by", 1),
    *("--tokenizer-type", "NullTokenizer", "--micro-batch-size", 2),
    *("--global-batch-size", 192, "--train-iters", 10, "--lr", 1e-4),
)
UNTIED = ("--untie-embeddings-and-output-weights",)
DATA = "stands for a dataset"
SHARED = ("--bf16", "--use-distributed-optimizer")
SMALL_BUCKETS = ("--overlap-grad-reduce", "--overlap-param-gather", "--ddp-bucket-size", 30_000)
TP2, PP2 = ("--tensor-model-parallel-size", 2), ("--pipeline-model-parallel-size", 2)
CHUNKS = (*TP2, "--pipeline-model-parallel-size", 4, "--num-layers-per-virtual-pipeline-stage", 1)
LAST, FIRST = "--decoder-last-pipeline-num-layers", "--decoder-first-pipeline-num-layers"
# Of 8 layers 4, 3 and 1 in three stages, or 2, 4 and 2 in two chunks each.
PP3 = ("--pipeline-model-parallel-size", 3)
UNEVEN = (*PP3, FIRST, 4, LAST, 1)
FORGET_8 = ("--forget-batch-size", 8)
UNEVEN_CHUNKS = (*PP3, FIRST, 2, LAST, 2, "--num-virtual-stages-per-pipeline-rank", 2)
GROUPS = ("--group-query-attention", "--num-query-groups", 2, "--sequence-parallel")
QWEN = ("--add-qkv-bias", "--qk-layernorm", "--kv-channels", 40, "--padded-vocab-size", 640)
EXPERTS = ("--num-experts", 6, "--moe-ffn-hidden-size", 42, "--moe-router-topk", 2)
EP2 = ("--expert-model-parallel-size", 2)
# The first layer of two is dense; experts that every token has.
MIXED = (
    *("--moe-layer-freq", "([0]+[1])*4", "--moe-shared-expert-intermediate-size", 34),
    *("--moe-shared-expert-gate", "--sequence-parallel", "--expert-tensor-parallel-size", 1),
)
# The checkpoint need not exist yet.
UNLEARN = ("--pretrained-checkpoint", "/nowhere", "--forget-data-path", DATA)
# GPUs, rank, flags.
CASES = {
    "fp32": (12, 5, UNTIED),
    "fp16, interleaved": (48, 47, ("--fp16", *CHUNKS)),
    "fp32 shards, grouped queries": (
        12,
        3,
        (*UNTIED, "--use-distributed-optimizer", *TP2, *GROUPS),
    ),
    "norms and biases": (
        24,
        19,
        (*UNTIED, *SHARED, *PP2, *SMALL_BUCKETS, *GROUPS[:-1], *QWEN),
    ),
    "buckets": (12, 7, (*UNTIED, *SHARED, *SMALL_BUCKETS)),
    "bf16 gradients": (12, 5, (*UNTIED, *SHARED, "--grad-reduce-in-bf16")),
    "tied, first stage": (24, 0, (*SHARED, *PP2, *SMALL_BUCKETS)),
    "tied, last stage": (24, 23, (*SHARED, *PP2, *SMALL_BUCKETS)),
    "sequences split": (48, 41, (*SHARED, *TP2, "--context-parallel-size", 4, *SMALL_BUCKETS)),
    "interleaved": (48, 17, (*SHARED, *CHUNKS, *SMALL_BUCKETS)),
    "experts": (12, 5, (*UNTIED, *SHARED, *EXPERTS, *SMALL_BUCKETS)),
    "experts, EP": (12, 5, (*UNTIED, *SHARED, *EXPERTS, *EP2, *SMALL_BUCKETS)),
    "some experts, interleaved": (
        48,
        25,
        (*SHARED, *CHUNKS, *EXPERTS, *EP2, *MIXED, *SMALL_BUCKETS),
    ),
    "experts in halves, unlearning": (
        48,
        31,
        (*SHARED, *TP2, *EXPERTS, *EP2, "--sequence-parallel", *UNLEARN),
    ),
    "uneven, first stage": (12, 1, (*SHARED, *UNEVEN, *SMALL_BUCKETS, *UNLEARN, *FORGET_8)),
    "uneven, between": (12, 6, (*UNTIED, *SHARED, *UNEVEN)),
    "uneven, last stage": (12, 11, (*SHARED, *UNEVEN, *UNLEARN, *FORGET_8)),
    "uneven and interleaved": (12, 5, ("--fp16", *UNTIED, *UNEVEN_CHUNKS)),
    "uneven, some experts": (
        12,
        7,
        (*UNTIED, *SHARED, *PP3, LAST, 2, *EXPERTS, "--moe-layer-freq", "([1]*3+[0]*5)"),
    ),
    "uneven, some experts, interleaved": (
        24,
        10,
        (*SHARED, *UNEVEN_CHUNKS, *EXPERTS, *EP2, "--moe-layer-freq", "([0]*4+[1]+[0]*3)"),
    ),
    "unlearning, 512 ranks": (512, 301, (*UNTIED, *SHARED, *TP2, *PP2, *UNLEARN)),
}


@pytest.fixture(scope="module")
def outputs(server: Server, tmp_path_factory) -> dict[str, tuple[int, str]]:
    data = write_index(tmp_path_factory.mktemp("check") / "data", 10**6, 1000)
    launches = []
    for gpus, rank, more in CASES.values():
        batch = ("--global-batch-size", 2 * gpus)
        words = ("--gpus", gpus, "--check", "--check-rank", rank, "--", *MODEL, *batch, *more)
        words = tuple(data if word == DATA else word for word in words)
        launches.append(Launch(words, script=ROOT / "tools" / "plan_run.py"))
    return dict(zip(CASES, server.results(launches), strict=True))


@pytest.mark.parametrize("name", CASES)
def test_parameters_and_bytes_are_exact(name, outputs):
    code, output = outputs[name]
    assert code == 0, output
    lines = output[output.index("check         rank") :].splitlines()
    assert lines[0].startswith(f"check         rank {CASES[name][1]}, ")
    parts = {line.split()[0] for line in lines[1:]}
    expected = {"parameters", "weights", "gradients", "optimizer"}
    assert parts == expected | ({"reference"} if "--forget-data-path" in CASES[name][2] else set())
    assert all(line.endswith(", equal") for line in lines[1:])


def test_a_difference_is_an_error_that_names_it(server: Server):
    # The plan counts the scales of queries and keys, 24 of each in 8 layers; an L2 norm has none.
    norms = ("--qk-layernorm", "--qk-l2-norm")
    words = ("--gpus", 12, "--check", "--", *MODEL, *UNTIED, *norms)
    launch = Launch(words, script=ROOT / "tools" / "plan_run.py")
    [(code, output)] = server.results([launch])
    assert code == 2
    assert "plan_run.py: error: --check: rank 0 (stage 0): expected the plan's numbers" in output
    built = 8 * (4 * 96**2 + 3 * 96 * 200 + 2 * 96) + 96 + 2 * 501 * 96
    assert f"parameters {built + 8 * 2 * 24:,} planned, {built:,} built" in output


def test_a_checkpoint_of_another_model_is_refused_as_by_the_run(server: Server, tiny):
    script = ROOT / "tools" / "plan_run.py"
    wide = ("--train-iters", 10, "--hidden-size", 48)
    cases = {
        "--load": tiny.plain(*wide, "--load", tiny.base),
        "--pretrained-checkpoint": tiny.plain(*wide, "--pretrained-checkpoint", tiny.base),
        "--reference-load": tiny.unlearn(*wide, "--load", "/nowhere"),
        "": tiny.unlearn("--train-iters", 10),
    }
    words = ("--gpus", 1, "--gpu-type", "CPU", "--peak-flops", 1e11, "--check", "--")
    launches = [Launch((*words, *flags), script=script) for flags in cases.values()]
    *wrong, (code, output) = server.results(launches)
    assert code == 0, output
    for flag, (code, output) in zip(cases, wrong, strict=False):
        assert code == 2, output
        assert f"error: {flag}: expected --hidden-size 48, as this run has, found 32 in " in output


@pytest.mark.parametrize(
    ("more", "start"),
    [
        (("--train-iters", 400), "--data-path: expected at least 6400 samples"),
        (("--split", "99999,1,0"), "--split: expected at least one document of --data-path "),
        (
            ("--split", "1,0,0", "--eval-iters", 1),
            "--split: expected a share of --data-path for valid",
        ),
    ],
)
def test_data_that_no_run_can_read_are_refused_in_its_words(more, start, server: Server, tiny):
    run = tiny.flags("--data-path", tiny.forget, tiny.replay, "--train-iters", 10, *more)
    planned = ("--gpus", 1, "--gpu-type", "CPU", "--peak-flops", 1e11, "--", *run)
    launches = [Launch(run), Launch(planned, script=ROOT / "tools" / "plan_run.py")]
    errors = []
    for code, output in server.results(launches):
        assert code == 2, output
        errors.append(output.splitlines()[-1].partition(" error: ")[2])
    assert errors[0].startswith(start)
    assert errors[0] == errors[1]


def test_checkpoints_that_do_not_exist_yet_are_stood_for_however_they_are_written(tmp_path):
    words = [
        "--load=/nowhere",
        "--pretrained-checkpoint",
        "/nowhere",
        f"--reference-load={tmp_path}",
    ]
    replaced = _replaced(words, "/empty")
    assert replaced[2:] == ["--load", "/empty", "--pretrained-checkpoint", "/empty"]
