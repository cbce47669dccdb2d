"""A run finds the index that `tools/build_index.py` built: it writes nothing."""

import pytest

from tests.helpers.entry import ROOT, Launch
from tests.helpers.gpt_datasets import files
from tests.helpers.tiny import BATCH

TOOL = ROOT / "tools" / "build_index.py"
STEPS = ("--train-iters", 2, "--eval-iters", 1, "--eval-interval", 1, "--split", "80,10,10")


def blends(tiny):
    """By kind of run, its flags; text to forget and to replay is blended, differently."""
    pair = ("--forget-data-path", 2, tiny.forget, 1, tiny.replay, "--allow-data-overlap")
    unlearn = tiny.objective(*STEPS, "--pretrained-checkpoint", tiny.base)
    return {
        "plain": tiny.plain(*STEPS),
        "unlearning": (*unlearn, "--data-path", 3, tiny.replay, 1, tiny.forget, *pair),
        # Megatron's flags that expect the index and look for nothing.
        "deferred": (*tiny.plain(*STEPS), "--dataloader-defer-npy-index-mmap"),
    }


@pytest.fixture(scope="module")
def built(tiny, server, tmp_path_factory):
    """By kind of run: its cache, what the tool wrote there, and what the run left."""
    folder = tmp_path_factory.mktemp("build_index")
    launches = {}
    for name, flags in blends(tiny).items():
        launches[name] = (*flags, "--data-cache-path", folder / name)
    tools = {name: Launch(("--", *flags), script=TOOL) for name, flags in launches.items()}
    told = server.run_all(tools, folder / "tensorboard-tool")
    before = {name: files(folder / name) for name in launches}
    layouts = {"plain": 2}
    runs = {n: Launch(flags, ranks=layouts.get(n, 1)) for n, flags in launches.items()}
    server.run_all(runs, folder / "tensorboard")
    after = {name: files(folder / name) for name in launches}
    return folder, told, before, after


@pytest.mark.parametrize(("name", "indices"), [("plain", 9), ("unlearning", 18), ("deferred", 9)])
def test_the_run_builds_nothing(built, name, indices):
    """Two data sets and their blend, in three splits, for each side; an array has a file."""
    _, told, before, after = built
    assert len(before[name]) == indices // 3 * (4 + 4 + 3)
    assert after[name] == before[name]
    assert f"{indices} indices built, 0 found" in told[name].output
    assert "-- arguments --" not in told[name].output


def test_the_tool_logs_to_nowhere(built):
    folder, *_ = built
    assert not (folder / "tensorboard-tool").exists()


def test_another_run_has_another_index(built, tiny, server):
    folder, _, before, _ = built
    flags = (*tiny.plain(*STEPS), "--data-cache-path", folder / "plain")
    again, other = server.results(
        [Launch(("--", *flags, *more), script=TOOL) for more in ((), ("--seed", 5))]
    )
    assert "0 indices built, 9 found" in again[1]
    assert "9 indices built, 0 found" in other[1]
    # Where nothing is trained there need be no number of iterations.
    validation = (*STEPS[2:], "--skip-train", "--data-cache-path", folder / "validation")
    ((_, evaluated),) = server.results([Launch(("--", *tiny.plain(*validation)), script=TOOL)])
    assert "9 indices built, 0 found" in evaluated
    assert before["plain"].items() <= files(folder / "plain").items()


def test_what_megatron_says_before_it_leaves_is_shown(tiny, server, tmp_path):
    flags = (*tiny.plain(*STEPS), "--data-cache-path", tmp_path, "--checkpoint-activations")
    ((code, output),) = server.results([Launch(("--", *flags), script=TOOL)])
    assert code == 2
    assert "--checkpoint-activations is no longer valid" in output
    assert "which says why above" in output


@pytest.mark.parametrize(
    ("remove", "message"),
    [
        ("--data-cache-path", "--data-cache-path: expected the folder"),
        ("--global-batch-size", "--global-batch-size: expected a size"),
    ],
)
def test_what_the_index_depends_on_must_be_named(tiny, server, remove, message):
    flags = [str(word) for word in tiny.plain(*STEPS)]
    assert str(BATCH) in flags
    place = flags.index(remove)
    del flags[place : place + 2]
    ((code, output),) = server.results([Launch(("--", *flags), script=TOOL)])
    assert code == 2
    assert message in output
    assert "Traceback" not in output
