"""What a run's folder holds, in lines and as JSON."""

import argparse
import json
import sys

import pytest
import torch

from megatron_ext.checkpoint.complete import MARKS
from megatron_ext.checkpoint.inspect import TRACKER
from megatron_ext.checkpoint.recovery import folder
from megatron_ext.checkpoint.torch_dist import LazyTensor, write
from tools import show_checkpoint


@pytest.fixture
def show(tmp_path, monkeypatch, capsys):
    """Checkpoints of iterations 2 and 4 of an unlearning run; returns what is printed and the exit code."""
    saved = argparse.Namespace(consumed_train_samples=32, seq_length=64, num_layers=2, bf16=True)
    saved.unlearn_composition = {"--forget-batch-size": 8}
    saved.unlearn_reference = {"directory": "ckpt/base", "folder": "iter_0000040", "digest": "ab"}
    for iteration in (2, 4):
        tensor = LazyTensor("weight", (), (8, 8), lambda: torch.zeros(8, 8))
        write(folder(tmp_path, iteration), [tensor], dtype=torch.float32, args=saved)
    (tmp_path / TRACKER).write_text("4")

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["show_checkpoint.py", str(tmp_path), *map(str, words)])
        with pytest.raises(SystemExit) as leaving:
            show_checkpoint.main()
        return capsys.readouterr().out, leaving.value.code

    run.directory = tmp_path
    return run


def test_the_latest_is_shown_with_what_its_run_recorded(show):
    text, code = show()
    assert code == 0
    found = {name: value.strip() for name, value in (t.split(":", 1) for t in text.splitlines())}
    assert found["checkpoints"] == "iter_0000002, iter_0000004"
    assert (found["checkpoint"], found["consumed tokens"], found["precision"]) == (
        "iter_0000004",
        "2,048",
        "bf16",
    )
    assert found["kind"] == "unlearning"
    assert found["reference"] == "directory ckpt/base, folder iter_0000040, digest ab"
    assert "software" not in found  # it was not recorded
    files = sum(file.stat().st_size for file in folder(show.directory, 4).iterdir())
    assert json.loads(show("--json", "--iteration", 2)[0])["iteration"] == 2
    assert found["size bytes"] == f"{files:,}"


def test_a_broken_one_is_told_beside_the_others(show):
    (folder(show.directory, 4) / MARKS[0]).unlink()
    text, code = show("--json")
    found = json.loads(text)
    assert code == 2
    assert found["checkpoints"]["iter_0000002"] is None
    assert MARKS[0] in found["checkpoints"]["iter_0000004"]
    assert "iter_0000004" in found["error"]
    assert show("--iteration", 2)[1] == 0
