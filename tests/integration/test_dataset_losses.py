"""`--dataset-log-interval`: the means of each dataset, at several layouts, against those of the blend."""

import re

import pytest

from tests.helpers.entry import Launch

STEPS = 4
FLAGS = (
    *("--dataset-log-interval", 1, "--train-iters", STEPS),
    *("--eval-iters", 2, "--eval-interval", STEPS),
)
LAYOUTS = {
    "1": ((), 1),
    "DP 2": (("--use-distributed-optimizer",), 2),
    "TP 2": (("--tensor-model-parallel-size", 2, "--sequence-parallel"), 2),
    "PP 2": (
        *(("--pipeline-model-parallel-size", 2, "--num-virtual-stages-per-pipeline-rank", 2),),
        2,
    ),
    "CP 2": (("--context-parallel-size", 2), 2),
}


@pytest.fixture(scope="module")
def runs(tiny, server, runs_directory):
    forget = ("--forget-data-path", 1, tiny.forget, 1, tiny.replay, "--allow-data-overlap")
    # A micro-batch of two holds samples of both.
    replay = ("--data-path", 1, tiny.replay, 1, tiny.forget)
    more = ("--forget-batch-size", 8, "--max-replay-increase", 100)
    unlearn = tiny.unlearn(*forget, *replay, *more, *FLAGS)
    launches = {name: Launch((*unlearn, *flags), ranks) for name, (flags, ranks) in LAYOUTS.items()}
    every = ("--dataset-log-interval", STEPS)
    launches["all steps at once"] = Launch((*unlearn, *every))
    launches["plain"] = Launch(tiny.plain(*FLAGS, "--load", tiny.base, "--finetune"))
    launches["without"] = Launch(unlearn[: unlearn.index("--dataset-log-interval")] + FLAGS[2:])
    return server.run_all(launches, runs_directory / "per_dataset")


def by_step(run, name):
    """What was logged of a mean: by dataset, its values by step."""
    return {
        tag.removeprefix(f"{name}/"): values
        for tag, values in run.scalars.items()
        if tag.startswith(f"{name}/")
    }


FORGET, REPLAY = "forget_text_document", "replay_text_document"
SIDES = {
    "forgotten": ("forget loss", "forget token probability"),
    "replayed": ("replay loss", "mitigation kl", "reference replay loss", "replay increase"),
}


@pytest.mark.parametrize("suffix", ["", " validation"])
@pytest.mark.parametrize("side", SIDES)
def test_the_datasets_of_a_blend_make_up_its_means(runs, side, suffix):
    run = runs["1"]
    steps = range(1, STEPS + 1) if not suffix else [STEPS]
    for step in steps:
        shares = []
        for name in SIDES[side]:
            means = by_step(run, f"{name}{suffix}")
            assert means.keys() == {FORGET, REPLAY}
            one, other = means[FORGET][step], means[REPLAY][step]
            shares.append((run.scalars[f"{name}{suffix}"][step] - other) / (one - other))
        # Every mean of a batch has the same tokens, of which each dataset has about half.
        assert shares == pytest.approx([shares[0]] * len(shares), abs=2e-3)
        assert 0.25 < shares[0] < 0.75


@pytest.mark.parametrize("layout", list(LAYOUTS)[1:])
def test_every_layout_logs_the_same(runs, layout):
    tags = {tag for tag in runs["1"].scalars if "_document" in tag}
    assert len(tags) == 24
    assert {tag for tag in runs[layout].scalars if "_document" in tag} == tags
    for tag in tags:
        assert runs[layout].series(tag) == pytest.approx(runs["1"].series(tag), rel=2e-4, abs=1e-6)


def test_an_interval_has_the_mean_of_its_steps(runs):
    for name in (*SIDES["forgotten"], *SIDES["replayed"]):
        for dataset, values in by_step(runs["1"], name).items():
            ((step, mean),) = by_step(runs["all steps at once"], name)[dataset].items()
            assert step == STEPS
            assert min(values.values()) < mean < max(values.values())
            assert mean == pytest.approx(sum(values.values()) / STEPS, rel=0.05, abs=1e-4)


def test_training_is_the_same_without_it(runs):
    without = runs["without"].scalars
    assert not [tag for tag in without if "_document" in tag]
    for tag in ("unlearn loss", "grad-norm", "replay loss validation"):
        assert without[tag] == runs["1"].scalars[tag]


def test_plain_training(runs):
    for suffix in ("", " validation"):
        means = by_step(runs["plain"], f"lm loss{suffix}")
        assert means.keys() == {FORGET, REPLAY}
        for step, whole in runs["plain"].scalars[f"lm loss{suffix}"].items():
            low, high = sorted(means[dataset][step] for dataset in means)
            assert low + 0.25 * (high - low) < whole < high - 0.25 * (high - low)


def test_the_console_has_them_too(runs):
    lines = re.findall(r"^ forget loss by dataset .*$", runs["1"].output, re.MULTILINE)
    assert len(lines) == STEPS
    found = by_step(runs["1"], "forget loss")
    values = " | ".join(f"{name}: {found[name][1]:.6E}" for name in (FORGET, REPLAY))
    assert lines[0] == f" forget loss by dataset at iteration 1 | {values} |"


def test_refused_where_there_are_no_datasets(tiny, server):
    flags = tiny.flags("--dataset-log-interval", 1, "--mock-data", "--train-iters", 1)
    ((code, output),) = server.results([Launch(flags)])
    assert code == 2
    assert "random tokens are of no dataset" in output
