"""The tool: what it prints, writes and refuses."""

import argparse
import contextlib
import json
import subprocess
import sys
from types import SimpleNamespace

import pytest

from megatron_ext.exceptions import ConfigError
from megatron_ext.gpus import GPUS, Cluster
from megatron_ext.planning.flags import architecture, entry_flags, layout, unlearning
from megatron_ext.planning.plan import plan
from tests.helpers.entry import ROOT
from tests.unit.test_plan import write_index

MODEL = [
    *("--num-layers", "32", "--hidden-size", "2048", "--ffn-hidden-size", "5504"),
    *("--num-attention-heads", "32", "--seq-length", "4096", "--vocab-size", "125696"),
    *("--swiglu", "--disable-bias-linear", "--untie-embeddings-and-output-weights", "--bf16"),
    *("--use-distributed-optimizer", "--micro-batch-size", "2", "--global-batch-size", "256"),
    *("--hidden-dropout", "0", "--attention-dropout", "0"),
    *("--position-embedding-type", "rope", "--normalization", "RMSNorm"),
]


def run(*words: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "tools" / "plan_run.py"), *map(str, words)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plan")
    return write_index(folder / "real", 10**9, 1000), write_index(folder / "qa", 10**8, 1000)


def test_text_and_numbers_say_the_same(data, tmp_path):
    real, synthetic = data
    result = run(
        *("--gpus", 64, "--price", 2.5, "--write-bandwidth", 4, "--rank-layouts", 3),
        *("--output", tmp_path / "plan.json", "--", *MODEL, "--train-iters", 954),
        *("--save-interval", 100, "--data-path", real, "--forget-data-path", synthetic),
    )
    assert result.returncode == 0, result.stderr
    numbers = json.loads((tmp_path / "plan.json").read_text())
    lines = result.stdout.splitlines()
    assert lines[0].startswith("parameters    2,133,985,280 ")
    # 954 steps of 128 forgotten samples, of 96.9% of the dataset.
    [warning] = numbers["warnings"]
    assert warning == f"{synthetic}: 5.2 epochs, more than 4 (arXiv 2305.16264)"
    assert lines[-1] == f"WARNING       {warning}"
    assert numbers["fits"] is True
    hours = 954 * numbers["seconds_per_step"] / 3600 * 64
    assert numbers["cost"] == pytest.approx(2.5 * hours)
    assert f"cost          {2.5 * hours:,.2f} at 2.5 a rank-hour" in lines
    assert numbers["write_seconds"] == pytest.approx(14 * 2_133_985_280 / 4e9)
    assert numbers["checkpoints"] == 10
    assert len(numbers["layouts"]) == 3
    assert numbers["layouts_that_fit"] > 3
    [stage] = numbers["stages"]
    assert stage["total"] == sum(stage["parts"].values()) == numbers["memory_total"]


def test_small_numbers_have_small_units():
    tiny = ("--num-layers", 2, "--hidden-size", 64, "--ffn-hidden-size", 128, "--seq-length", 64)
    words = (*MODEL, *tiny, "--num-attention-heads", 2, "--vocab-size", 500)
    words = ("--gpus", 2, "--rank-layouts", 1, "--", *words)
    lines = run(*words).stdout.splitlines()
    numbers = json.loads(run(words[0], words[1], "--json", *words[2:]).stdout)
    starts = [line.split(" ")[0] for line in lines]
    header, cells = lines[starts.index("memory,") :][:2]
    assert header.startswith("memory, MiB   stage")
    assert float(cells.split()[-1]) == pytest.approx(numbers["memory_total"] / 2**20, abs=0.01)
    _, milliseconds, unit, *_ = lines[starts.index("time")].split()
    assert unit == "ms"
    assert float(milliseconds) == pytest.approx(1e3 * numbers["seconds_per_step"], rel=0.01)
    header, layout = lines[starts.index("layouts") + 1 :][:2]
    assert header.split()[6:8] == ["MiB", "ms/step"]
    [fastest] = numbers["layouts"]
    assert float(layout.split()[6]) == pytest.approx(fastest["memory"] / 2**20, abs=0.1)
    assert float(layout.split()[7]) == pytest.approx(1e3 * fastest["seconds_per_step"], abs=1e-3)


def test_what_does_not_fit_is_said(data):
    words = ("--micro-batch-size", 32, "--global-batch-size", 2048)
    result = run("--gpus", 64, "--gpu-type", "A100-40", "--json", "--", *MODEL, *words)
    numbers = json.loads(result.stdout)
    assert numbers["fits"] is False
    assert numbers["warnings"][0].startswith("does not fit: stage 0 needs ")


def test_dropout_is_said_to_be_uncounted():
    result = run("--gpus", 64, "--json", "--", *MODEL, "--hidden-dropout", 0.1)
    [warning] = json.loads(result.stdout)["warnings"]
    assert warning.startswith("--hidden-dropout above 0 ")


def test_a_sequence_that_tp_does_not_divide_is_refused():
    sizes = ("--seq-length", 4095, "--tensor-model-parallel-size", 2)
    result = run("--gpus", 64, "--", *MODEL, *sizes, "--sequence-parallel")
    assert "error: --seq-length: expected a multiple of TP 2" in result.stderr
    assert run("--gpus", 64, "--", *MODEL, *sizes).returncode == 0


def test_a_cpu_has_no_memory_to_check():
    result = run("--gpus", 2, "--gpu-type", "CPU", "--json", "--", *MODEL)
    assert (
        result.stderr
        == "plan_run.py: error: --peak-flops: expected with --gpu-type CPU, found none\n"
    )
    result = run("--gpus", 2, "--gpu-type", "CPU", "--peak-flops", "1e11", "--json", "--", *MODEL)
    numbers = json.loads(result.stdout)
    assert (numbers["fits"], numbers["gpu_memory"]) == (None, None)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--gpus", "0"), "--gpus: expected a number above 0, found 0"),
        (("--gpus", "8", "--mfu", "0"), "--mfu: expected a number above 0, found 0.0"),
        (
            ("--gpus", "8", "--mfu", "45"),
            "--mfu: expected a share of the peak, at most 1, found 45",
        ),
        (("--gpus", "8", "--mfu", "nan"), "--mfu: expected a number above 0, found nan"),
        (("--gpus", "8", "--rank-layouts", "-1"), "--rank-layouts: expected at least 0, found -1"),
        (("--gpus", "48"), "--global-batch-size: expected a multiple of 96"),
        (
            ("--gpus", "4", "--", "--tensor-model-parallel-size", "3"),
            "--gpus: expected a multiple of 3 (--tensor-model-parallel-size 3), found 4",
        ),
        (("--gpus", "8", "--check", "--check-rank", "8"), "--check-rank: expected 0 to 7, found 8"),
    ],
)
def test_refusals_are_one_line(words, message):
    result = run(*words, *(() if "--" in words else ("--",)), *MODEL)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith(f"plan_run.py: error: {message}")
    assert result.stderr.count("\n") == 1


def test_epochs_of_conversations_are_those_of_a_run():
    result = run("--gpus", 1, "--", *MODEL, "--chat-data-path", "chat.jsonl")
    assert "iterations    set by the data: 2 epochs, 1,048,576 tokens a step" in result.stdout
    result = run("--gpus", 1, "--", *MODEL)
    assert "iterations    not given, 1,048,576 tokens a step" in result.stdout


def test_the_vocabulary_is_that_of_the_tokenizer_as_in_a_run(monkeypatch):
    from megatron_ext.planning import flags as planned

    tokenizer = SimpleNamespace(vocab_size=125_696)
    monkeypatch.setattr(planned, "build_reference", lambda _: tokenizer)
    words = [*MODEL, "--tokenizer-model", "tok.model"]
    assert architecture(entry_flags(words)).vocab_size == 125_696
    tokenizer.vocab_size = 64_000
    with pytest.raises(ConfigError, match=r"--vocab-size: expected 64000, .* found 125696"):
        architecture(entry_flags(words))


def test_flags_are_read_as_the_entry_point_reads_them():
    words = [*MODEL, "--pipeline-model-parallel-size", "4", "--sequence-parallel"]
    words += ["--num-layers-per-virtual-pipeline-stage", "2", "--forget-data-path", "x"]
    flags = entry_flags([*words, "--mitigation-weight", "0", "--recompute-activations"])
    where = layout(flags, gpus=16)
    assert (where.vpp, where.recompute, where.gradient) == (4, "selective", 4)
    assert where.sequence_parallel is False  # one TP rank
    assert architecture(flags).query_groups == 32
    groups = [*MODEL, "--num-query-groups", "8"]
    assert architecture(entry_flags(groups)).query_groups == 32
    assert architecture(entry_flags([*groups, "--group-query-attention"])).query_groups == 8
    # Megatron's number of groups, where the switch stands alone.
    assert architecture(entry_flags([*MODEL, "--group-query-attention"])).query_groups == 1
    removed = unlearning(flags)
    assert removed is not None
    assert (removed.reference, removed.forget_batch) == (False, 128)
    watched = unlearning(
        entry_flags([*words, "--mitigation-weight", "0", "--max-mitigation-kl", "1"])
    )
    assert watched is not None
    assert watched.reference
    fp16 = [word.replace("--bf16", "--fp16") for word in MODEL]
    assert layout(entry_flags(fp16), gpus=8).gradient == 2
    summed = entry_flags([*fp16, "--accumulate-allreduce-grads-in-fp32"])
    assert layout(summed, gpus=8).gradient == 4
    rounded = [*MODEL, "--grad-reduce-in-bf16"]
    assert layout(entry_flags(MODEL), gpus=8).gradient == 4
    assert layout(entry_flags(rounded), gpus=8).gradient == 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--seq-length", "8"], "--num-layers: expected a size"),
        (
            [*MODEL, "--attention-backend", "unfused"],
            "--attention-backend unfused is not supported by the plan",
        ),
        ([*MODEL, "--use-megatron-fsdp"], "--use-megatron-fsdp is not supported by the plan"),
        ([*MODEL, "--optimizer", "sgd"], "--optimizer: expected adam, .*, found sgd"),
        ([w for w in MODEL if w != "--swiglu"], "--swiglu: expected, found none"),
        ([*MODEL, "--no-pad-vocab-size"], "--no-pad-vocab-size is not supported by the plan"),
        (
            [*MODEL, "--normalization", "LayerNorm"],
            "--normalization: expected RMSNorm, .* LayerNorm",
        ),
        (
            [w for w in MODEL if w not in ("--position-embedding-type", "rope")],
            "--position-embedding-type: expected rope .*, found learned_absolute",
        ),
        ([*MODEL, "--num-layers", "-32"], "--num-layers: expected at least 1, found -32"),
        (
            [*MODEL, "--tensor-model-parallel-size=0"],
            "--tensor-model-parallel-size: expected at least",
        ),
        ([*MODEL, "--num-attention-heads", "33"], "--hidden-size: .* 33, .* found 2048"),
        (
            [*MODEL, "--max-position-embeddings", "2048"],
            "--seq-length: .* --max-position-embeddings 2048, found 4096",
        ),
        ([*MODEL, "--fp16"], "--bf16, --fp16: .* found both"),
        ([*MODEL, "--lr", "0"], "--lr: .* found 0"),
        (
            [*MODEL, "--train-iters", "10", "--lr-warmup-iters", "10"],
            "--lr-warmup-iters: .* less than 10, .* 10 iterations, found 10",
        ),
        ([*MODEL, "--train-samples", "255"], "--train-samples: .* 256 of one step, found 255"),
        (
            [*MODEL, "--train-iters", "10", "--train-samples", "2560"],
            "--train-samples: .* --train-iters, found both",
        ),
        ([*MODEL, "--save-interval", "0"], "--save-interval: expected at least 1, found 0"),
        (
            [*MODEL, "--tensor-parallel-size", "4"],
            "--tensor-parallel-size: expected --tensor-model-parallel-size, found an unknown flag",
        ),
        (
            [*MODEL, "--tensor_model_parallel_size=4"],
            "--tensor_model_parallel_size=4: expected --tensor-model-parallel-size, found an unknown flag",
        ),
    ],
)
def test_flags_that_are_missing_or_unknown_are_named(words, message):
    with pytest.raises(ConfigError, match=message):
        entry_flags(words)


def test_flags_of_a_run_are_not_taken_for_mistyped_ones():
    from megatron.training.arguments import add_megatron_arguments

    from megatron_ext.arguments import add_arguments

    parser = add_arguments(add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False)))
    mistyped = []
    for flag in (option for action in parser._actions for option in action.option_strings):
        # The choice of a recompute ends the plan's own parser.
        with contextlib.suppress(SystemExit):
            try:
                entry_flags([*MODEL, flag, "1"])
            except ConfigError as error:
                mistyped += [str(error)] * ("found an unknown flag" in str(error))
    assert mistyped == []


@pytest.mark.parametrize("forgotten", ["256", "512"])
def test_some_of_a_batch_is_replayed_as_in_a_run(forgotten):
    flags = entry_flags([*MODEL, "--forget-data-path", "x", "--forget-batch-size", forgotten])
    with pytest.raises(ConfigError, match=r"--forget-batch-size: .* fewer than the global batch"):
        unlearning(flags)


def test_checkpoints_are_those_that_stay():
    words = [*MODEL, "--train-iters", "950", "--save-interval", "100"]
    cluster = Cluster(gpus=8, name="H100", gpu=GPUS["H100"], peak_flops=989e12, mfu=0.45)
    assert plan(entry_flags(words), cluster)["checkpoints"] == 10
    retained = entry_flags([*words, "--save-retain-interval", "300"])
    assert plan(retained, cluster)["checkpoints"] == 4  # 300, 600, 900, 950


def test_chunks_need_a_pipeline_as_in_a_run():
    words = [*MODEL, "--num-virtual-stages-per-pipeline-rank", "2"]
    with pytest.raises(ConfigError, match=r"--pipeline-model-parallel-size: expected more than 1"):
        layout(entry_flags(words), gpus=8)
    assert layout(entry_flags([*words, "--pipeline-model-parallel-size", "2"]), gpus=8).vpp == 2


def test_the_tool_imports_no_torch():
    code = (
        "import sys; sys.argv = ['plan_run.py', '--gpus', '2', '--', *sys.argv[1:]]; "
        "import tools.plan_run as t; t.main(); assert not {'torch', 'megatron'} & set(sys.modules)"
    )
    command = [sys.executable, "-c", code, *MODEL]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
