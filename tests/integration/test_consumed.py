"""What a checkpoint says was consumed is what the run's steps have read, sample by sample."""

import json
from collections import Counter
from pathlib import Path

import pytest

from tests.helpers.entry import ROOT, Launch
from tests.helpers.tiny import BATCH, FORGET

SCRIPT, TOOL = ROOT / "tests" / "helpers" / "recorded.py", ROOT / "tools" / "plan_blend.py"
HALF, STEPS = 3, 6


@pytest.fixture(scope="module")
def folder(tiny, server, tmp_path_factory):
    """An unlearning run that goes on with other weights, and a plain one of unweighted data sets."""
    folder = tmp_path_factory.mktemp("consumed")

    def launch(name, *flags, ranks=1):
        common = ("--train-iters", STEPS, "--save-interval", HALF, "--allow-data-overlap")
        common = common if "unlearn" in name else common[:-1]
        return Launch((folder / name, *flags, *common), ranks=ranks, script=SCRIPT)

    def unlearn(weight):
        return (
            *tiny.objective("--forget-data-path", 2, tiny.forget, 1, tiny.replay),
            *("--data-path", weight, tiny.replay, 1, tiny.forget, "--mitigation-weight", 0),
            *("--pretrained-checkpoint", tiny.base),
            *("--load", folder / "unlearn", "--save", folder / "unlearn"),
        )

    plain = tiny.flags("--data-path", tiny.replay, tiny.forget, "--save", folder / "plain")
    first = {
        "unlearn-1": launch("unlearn-1", *unlearn(6), "--exit-interval", HALF, ranks=2),
        "plain": launch("plain-1", *plain),
    }
    server.run_all(first, folder / "tensorboard")
    runs = {"unlearn-2": launch("unlearn-2", *unlearn(1))}
    for name, run in server.run_all(runs, folder / "tensorboard").items():
        (folder / f"{name}.log").write_text(run.output)
    return folder


def counted(server, directory, *more):
    """By role and data set, samples, as the tool prints them."""
    launch = Launch(("--run", directory, "--json", *more), script=TOOL)
    ((code, output),) = server.results([launch])
    assert code == 0, output
    numbers = json.loads(output[output.index("{") : output.rindex("}") + 1])
    return numbers, {(d["role"], d["prefix"]): d["samples"] for d in numbers["datasets"]}


def read(folder, *names, replay="replay"):
    """The same as the steps have read them."""
    lines = [
        tuple(line.split())
        for name in names
        for file in (folder / name).iterdir()
        if file.suffix == ".txt"
        for line in file.read_text().splitlines()
    ]
    return Counter((role if role == "forget" else replay, path) for role, path in lines)


def test_an_unlearning_run_that_went_on_with_other_weights(folder, server):
    seen = read(folder, "unlearn-1", "unlearn-2")
    numbers, found = counted(server, folder / "unlearn")
    assert sum(seen.values()) == STEPS * BATCH == numbers["consumed_samples"]
    assert len(seen) == 4
    assert found == dict(seen)
    assert sum(n for (role, _), n in found.items() if role == "forget") == STEPS * FORGET
    # By the first weights alone it would have been another number.
    assert seen != {key: 2 * n for key, n in read(folder, "unlearn-1").items()}


def test_only_samples_that_come_in_another_order_are_told_of(folder):
    log = (folder / "unlearn-2.log").read_text()
    assert f"from sample {HALF * BATCH} on, the samples to replay come from other data or in" in log
    assert "the samples to forget come" not in log


def test_up_to_an_earlier_checkpoint(folder, server):
    _, found = counted(server, folder / "unlearn", "--iteration", HALF)
    assert found == dict(read(folder, "unlearn-1"))


def test_a_plain_run_and_one_whose_index_is_gone(folder, server, tiny):
    seen = dict(read(folder, "plain-1", replay="learn"))
    assert set(seen) == {("learn", str(tiny.replay)), ("learn", str(tiny.forget))}
    numbers, found = counted(server, folder / "plain")
    assert found == seen
    assert [d["tokens"] for d in numbers["datasets"]] == [64 * n for n in found.values()]
    for part in _parts(folder / "plain"):
        Path(part["roles"]["learn"]["index"]).unlink()
    assert counted(server, folder / "plain")[1] == seen


def test_a_checkpoint_that_is_converted_keeps_its_record(tiny, server, folder):
    flags = tiny.plain(
        *(
            "--load",
            folder / "plain",
            "--train-iters",
            STEPS,
            "--ckpt-convert-format",
            "torch_dist",
        ),
        *("--ckpt-convert-save", folder / "converted"),
    )
    server.run_all({"convert": Launch(flags)}, folder / "tensorboard")
    assert _parts(folder / "converted" / "torch_dist") == _parts(folder / "plain")


def test_without_a_record_nothing_is_claimed(tiny, server, folder):
    ((code, output),) = server.results([Launch(("--run", folder), script=TOOL)])
    assert code == 2
    assert "--run: expected a finished checkpoint" in output


def _parts(directory):
    from megatron_ext.checkpoint.inspect import open_checkpoint

    return open_checkpoint(directory, flag="--load").args.consumed_data
