"""Which checkpoint a run starts from, goes on from, and takes for its reference."""

import json
import shutil

import pytest

from tests.helpers.entry import ROOT, Launch, run, succeed
from tests.helpers.tiny import REFERENCE_ITERATION

LONGER = ("--train-iters", 3, "--lr", 1e-3, "--eval-iters", 0)
SHORT = (*LONGER, "--exit-interval", 2, "--save-interval", 2)


@pytest.fixture(scope="module")
def runs(tiny, server, tmp_path_factory):
    """First starts that later ones go on from."""
    directory = tmp_path_factory.mktemp("start")
    release = directory / "release_base"
    release.mkdir()
    (latest,) = tiny.base.joinpath("latest_checkpointed_iteration.txt").read_text().split()
    shutil.copytree(tiny.base / f"iter_{int(latest):07d}", release / "release")
    (release / "latest_checkpointed_iteration.txt").write_text("release")
    launches = {
        "earlier": tiny.objective(
            *SHORT, "--load", tiny.base, "--finetune", "--ckpt-step", REFERENCE_ITERATION
        ),
        "alone": tiny.objective(
            *(*SHORT, "--pretrained-checkpoint", tiny.base, "--save", directory / "alone"),
            *("--mitigation-weight", 0),
        ),
        "buckets": tiny.objective(
            *(*SHORT, "--pretrained-checkpoint", tiny.base, "--save", directory / "buckets"),
            *("--use-distributed-optimizer", "--overlap-grad-reduce", "--ddp-bucket-size", 5000),
        ),
        "release": tiny.objective(
            *SHORT, "--pretrained-checkpoint", release, "--save", directory / "release"
        ),
    }
    launches = {name: Launch(flags) for name, flags in launches.items()}
    return directory, server.run_all(launches, directory / "tensorboard")


def resume(tiny, server, runs, name, *more):
    directory, _ = runs
    # Under `more` a flag of before is given again: the later one counts.
    flags = tiny.objective(*LONGER, "--load", directory / name, *more)
    return server.run(
        Launch(flags), directory / "tensorboard" / f"{name} {json.dumps([*map(str, more)])[:20]}"
    )


def error_of(result):
    (line,) = [line for line in result.output.splitlines() if "error:" in line]
    assert result.returncode == 2
    assert "Traceback" not in result.output
    return line


def test_a_run_starts_no_process_and_imports_neither_compiler_nor_transformers(tiny, tmp_path):
    """They would take half of a start and of a first save, and thousands of files, on every rank."""
    script = ROOT / "tests" / "helpers" / "imported.py"
    flags = tiny.unlearn(*SHORT, "--save", tmp_path / "save")
    found = succeed(run(Launch(flags, script=script), tmp_path / "tensorboard"))
    assert (tmp_path / "save" / "iter_0000002").is_dir()
    (line,) = [line for line in found.output.splitlines() if line.startswith('{"imported"')]
    told = json.loads(line)
    assert told["imported"] == ["sentencepiece"]
    assert told["started"] == []
    assert told["collects"]
    assert told["frozen"] > 300_000  # what was imported


def test_the_reference_is_the_iteration_that_the_run_starts_from(runs):
    _, made = runs
    assert f"iter_{REFERENCE_ITERATION:07d}" in made["earlier"].line("reference:")
    # Student and reference are the same weights at first; KL has only rounding left.
    assert made["earlier"].series("mitigation kl")[0] < 1e-9


def test_a_student_never_becomes_its_own_reference(tiny, server, runs):
    error = error_of(resume(tiny, server, runs, "alone"))
    assert "--reference-load" in error
    assert "unlearned without one" in error
    named = succeed(resume(tiny, server, runs, "alone", "--reference-load", tiny.base))
    assert named.series("mitigation kl")[0] > 1e-9


def test_a_release_checkpoint_serves_as_reference_on_resume_too(tiny, server, runs):
    _, made = runs
    again = succeed(resume(tiny, server, runs, "release"))
    assert again.digest() == made["release"].digest()


@pytest.mark.parametrize(
    ("flag", "value", "before"),
    [
        ("--forget-batch-size", 4, 12),
        ("--eval-global-batch-size", 32, 16),
        ("--global-batch-size", 32, 16),
    ],
)
@pytest.mark.parametrize("name", ["alone", "release"])
def test_another_composition_is_refused_on_resume(tiny, server, runs, name, flag, value, before):
    reference = ("--reference-load", tiny.base) if name == "alone" else ()
    error = error_of(resume(tiny, server, runs, name, *reference, flag, value))
    assert flag in error or flag == "--global-batch-size"
    assert str(value) in error
    assert str(before) in error


def test_going_on_from_another_kind_of_run_is_refused(tiny, server, runs):
    directory, _ = runs
    flags = tiny.objective(*LONGER, "--load", tiny.base)
    error = error_of(server.run(Launch(flags), directory / "tensorboard" / "other kind"))
    assert f"--load {tiny.base}" in error
    assert "--pretrained-checkpoint" in error


def test_a_longer_run_is_refused_unless_it_says_which_schedule_counts(tiny, server, runs):
    error = error_of(resume(tiny, server, runs, "release", "--train-iters", 4))
    assert "--train-iters" in error
    assert "--override-opt-param-scheduler" in error
    longer = ("--train-iters", 4, "--override-opt-param-scheduler")
    assert max(succeed(resume(tiny, server, runs, "release", *longer)).scalars["replay loss"]) == 4


@pytest.mark.parametrize(
    ("flag", "rate"), [("override", 4e-4), ("use-checkpoint", 3e-4)], ids=["override", "checkpoint"]
)
@pytest.mark.parametrize("name", ["release", "buckets"])
def test_another_learning_rate_is_the_flags_or_the_checkpoints(
    tiny, server, runs, name, flag, rate
):
    # At the last iteration the rate is the lowest. Megatron finds groups of parameters again by their rates.
    more = ("--lr", 2e-3, "--min-lr", 4e-4, f"--{flag}-opt-param-scheduler")
    if name == "buckets":
        more += ("--use-distributed-optimizer", "--overlap-grad-reduce")
    found = succeed(resume(tiny, server, runs, name, *more)).scalars["learning-rate"]
    assert found == {3: pytest.approx(rate)}


def test_buckets_of_the_distributed_optimizer_stay_or_are_named(tiny, server, runs):
    flags = ("--use-distributed-optimizer", "--overlap-grad-reduce")
    resumed = succeed(resume(tiny, server, runs, "buckets", *flags))
    assert len(resumed.series("unlearn loss")) == 1
    error = error_of(resume(tiny, server, runs, "buckets", "--use-distributed-optimizer"))
    for wanted in ("--load", "--ddp-bucket-size", "--dist-ckpt-optim-fully-reshardable"):
        assert wanted in error, error


def test_a_run_that_was_stopped_at_its_end_validates_whatever_the_interval_was(
    tiny, server, tmp_path
):
    # With weights a data set has just the samples that are asked for.
    blends = ("--data-path", 1, tiny.replay, "--forget-data-path", 1, tiny.forget)
    run = tiny.objective(
        *(*blends, "--pretrained-checkpoint", tiny.base, "--load", tmp_path, "--save", tmp_path),
        *("--mitigation-weight", 0, "--train-iters", 2, "--save-interval", 2, "--eval-iters", 1),
    )
    often = Launch((*run, "--eval-interval", 1, "--exit-interval", 2))
    succeed(server.run(often, tmp_path / "tensorboard 1"))
    rarely = succeed(server.run(Launch((*run, "--eval-interval", 2)), tmp_path / "tensorboard 2"))
    assert list(rarely.scalars["replay loss validation"]) == [2]
    assert "replay loss" not in rarely.scalars
    # Nor does it need a number of iterations where nothing is trained.
    one = tiny.plain("--load", tiny.base, "--skip-train", "--eval-iters", 1)
    validated = succeed(server.run(Launch(one), tmp_path / "tensorboard 3"))
    assert "validation loss at iteration 40 on validation set" in validated.output
