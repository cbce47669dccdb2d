"""One iteration of a checkpoint directory, by the name of its folder."""

import pytest

from megatron_ext.checkpoint.inspect import TRACKER
from megatron_ext.checkpoint.named import open_named, short_names, split_name
from megatron_ext.conversion.to_huggingface import export_model
from megatron_ext.exceptions import CheckpointError, ConfigError
from tests.helpers.checkpoints import write_iterations


@pytest.fixture
def run(tmp_path):
    return write_iterations(tmp_path / "run", 2, 4, 6)


def test_an_iteration_or_the_latest_is_opened(run):
    latest, older = (open_named(name, flag="--model") for name in (run, run / "iter_0000002"))
    assert (latest.iteration, latest.path) == (6, run / "iter_0000006")
    # Tokenizer and chat template are looked for in the directory.
    assert (older.iteration, older.path, older.directory) == (2, run / "iter_0000002", run)
    assert open_named(f"{run}/iter_4/", flag="--model").iteration == 4
    (run / TRACKER).unlink()
    assert open_named(run / "iter_0000004", flag="--model").iteration == 4


def test_a_run_may_be_called_like_an_iteration(tmp_path):
    inner = write_iterations(tmp_path / "iter_0000002", 8)
    assert split_name(inner) == (inner, None)
    assert open_named(inner, flag="--model").iteration == 8
    assert open_named(inner / "iter_0000008", flag="--model").directory == inner


def test_what_is_not_there_or_not_complete_is_told_from_what_is(run):
    def refused(name):
        with pytest.raises(CheckpointError) as found:
            open_named(name, flag="--model")
        return str(found.value)

    expected = "expected a complete iteration of"
    assert refused(run / "iter_0000003") == (
        f"--model {run}/iter_0000003: {expected} {run} (complete: 2, 4, 6), found none: there is no such "
        "folder"
    )
    (tensors,) = (run / "iter_0000004").glob("*.distcp")
    tensors.write_bytes(tensors.read_bytes()[:-1])
    size = tensors.stat().st_size
    assert refused(run / "iter_0000004") == (
        f"--model {run}/iter_0000004: {expected} {run} (complete: 2, 6), found none: {tensors.name} has "
        f"{size} of {size + 1} bytes"
    )
    assert refused(run.parent / "iter_0000001").endswith(
        "(complete: none), found none: there is no such folder"
    )
    assert refused("no/such/iter_0000001").endswith("found nothing at no/such")


def test_export_takes_an_iteration_by_its_folder_or_by_its_flag(run, tmp_path):
    with pytest.raises(
        ConfigError, match=r"^--iteration: expected none beside --checkpoint .*/iter_0000002"
    ):
        export_model(run / "iter_0000002", tmp_path / "out", iteration=4)
    with pytest.raises(CheckpointError, match=r"^--checkpoint .*iter_0000003: .*complete: 2, 4, 6"):
        export_model(run / "iter_0000003", tmp_path / "out")


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["runs/base", "runs/new"], ["base", "new"]),
        (["runs/base", "old/base"], ["runs/base", "old/base"]),
        (["runs/base", "runs/base"], ["base", "base"]),
        (["runs/new/iter_0000002", "runs/new/iter_0000014/"], ["new@2", "new@14"]),
        (["runs/new", "runs/new/iter_0000002", "runs/base"], ["new", "new@2", "base"]),
        (["a/new/iter_0000002", "b/new/iter_0000002"], ["a/new@2", "b/new@2"]),
        (["a/new/iter_0000002", "b/new/iter_0000004"], ["new@2", "new@4"]),
        (["a/new@2", "b/new/iter_0000002"], ["a/new@2", "b/new@2"]),
        (["a/new@2", "a/new/iter_0000002"], ["a/new@2", "a/new/iter_0000002"]),
    ],
)
def test_names_tell_models_apart_and_show_the_iteration(names, expected):
    assert short_names(names) == expected
