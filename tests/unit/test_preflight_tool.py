"""The tool around the checks of test_preflight.py: its table, its flags, and how it finds its ranks."""

import json
import os
import subprocess
import sys

import pytest
import torch.distributed as dist

from megatron_ext.exceptions import ConfigError
from megatron_ext.preflight import files, verdict
from megatron_ext.preflight.ranks import connect
from tests.helpers.entry import ROOT
from tools.preflight import parse_args, write_table


def test_the_tool_prints_a_table_and_fails_with_1(tmp_path):
    alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    result = subprocess.run(
        [
            *(sys.executable, ROOT / "tools" / "preflight.py", "--shared", "/proc/nowhere"),
            *("--message-mib", "0.1", "--json", tmp_path / "report.json"),
            *("--table", tmp_path / "logs" / "table.txt"),
        ],
        env=os.environ | alone | {"MASTER_PORT": "0"},
        **{"capture_output": True, "text": True, "timeout": 120},
    )
    assert result.returncode == 1, result.stderr
    lines = result.stdout.splitlines()
    assert lines[0].split() == ["check", "result", "nodes", "found"]
    assert any(line.startswith("shared folder  FAIL  ") for line in lines)
    assert lines[-1].endswith("1 FAIL")
    assert (tmp_path / "logs" / "table.txt").read_text() == result.stdout
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["passed"] is False
    assert len(report["rows"]) == len(lines) - 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--checkpoint-bytes", "inf"), "--checkpoint-bytes: expected 0 or more, found inf"),
        (("--checkpoint-bytes", "-5"), "--checkpoint-bytes: expected 0 or more, found -5.0"),
        (("--message-mib", "1", "-1"), "--message-mib: expected more than 0, found -1.0"),
        (("--min-bus-bandwidth", "nan"), "--min-bus-bandwidth: expected more than 0, found nan"),
        (("--timeout", "0"), "--timeout: expected more than 0, found 0.0"),
    ],
)
def test_numbers_that_check_nothing_are_refused(words, message, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["preflight.py", *words])
    with pytest.raises(ConfigError, match=f"^{message}$"):
        parse_args()


def test_of_a_shared_folder_the_last_part_alone_is_made(tmp_path):
    new = tmp_path / "ckpt"
    mistyped = files.write_probe(new / "run", 1 << 20)
    assert mistyped == {
        "error": f"{new / 'run'}: expected a folder, found none, and no {new}",
    }
    assert not new.exists()
    for made, said in ((True, "; was not there, and was made"), (False, " MB/s")):
        probe = files.write_probe(new, 1 << 20)
        assert probe["made"] == made
        answer = files.read_probe(probe, patience=1)
        row, _ = verdict.shared(["node0"], probe, [answer], needed=0)
        assert row.status == verdict.PASS
        assert row.detail.endswith(said)


def test_a_table_that_cannot_be_written_leaves_what_was_printed(tmp_path, capsys):
    write_table(tmp_path / "table.txt", "1 FAIL")
    (tmp_path / "table.txt").chmod(0o444)
    write_table(tmp_path / "table.txt", "2 FAIL")
    assert (tmp_path / "table.txt").read_text() == "2 FAIL\n"
    write_table(tmp_path / "table.txt" / "x", "1 FAIL")
    assert capsys.readouterr().err.startswith(f"preflight.py: --table {tmp_path}/table.txt/x: ")


def test_a_start_is_a_checkpoint_that_is_there(tmp_path):
    found = files.read_input(str(tmp_path))
    name = "latest_checkpointed_iteration.txt"
    assert found == {"error": f"{tmp_path}: expected a checkpoint, found no {name}"}
    (tmp_path / name).write_text("7")
    found = files.read_input(str(tmp_path))
    assert found == {"error": f"{tmp_path}: cannot be read: No such file or directory"}
    for iteration, folder in (("7", "iter_0000007"), ("release", "release")):
        (tmp_path / name).write_text(iteration)
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "x.distcp").touch()
        assert files.read_input(str(tmp_path))["found"].startswith(f"{folder}, 1 files, digest ")


def test_a_start_without_a_launcher_is_refused():
    with pytest.raises(
        ConfigError, match=r"^RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT: "
    ):
        connect({}, timeout=1)


def test_tasks_of_srun_are_ranks_on_nodes_that_have_unequal_numbers_of_them():
    served = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    task = {"SLURM_PROCID": "8", "SLURM_STEP_NUM_TASKS": "15", "SLURM_LOCALID": "0"}
    task |= {"SLURMD_NODENAME": "node1", "SLURM_STEP_TASKS_PER_NODE": "8,7"}
    task |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(served.port)}
    ranks = connect(task, timeout=10)
    assert (ranks.rank, ranks.world, ranks.leads_node, ranks.node) == (8, 15, True, "node1")
