"""What the job scripts of examples/slurm would start, with stand-ins for Slurm; see `make slurm-test`."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.entry import ROOT
from tests.helpers.recipes import after, build, executable
from tests.helpers.slurm import JOB, SLURM, preflight, stand_ins


@pytest.fixture
def programs(tmp_path) -> str:
    return stand_ins(tmp_path)


def test_the_names_of_many_nodes_are_read_to_their_end(programs, tmp_path):
    """Slurm's program was ended by SIGPIPE, and the job with it."""
    executable(tmp_path / "scontrol", "seq -f node%06g 7 20000")
    result = preflight(programs, OUT="/ckpt")
    assert result.returncode == 0, result.stderr
    [endpoint] = after(result.stdout.splitlines(), "--rdzv-endpoint")
    assert endpoint.startswith("node000007:")


@pytest.mark.parametrize(("job", "port"), [(12767, 32767), (12768, 20000), (38303, 32767)])
def test_the_rendezvous_is_below_the_ports_that_linux_gives_to_connections(programs, job, port):
    words = preflight(programs, OUT="/ckpt", SLURM_JOB_ID=str(job)).stdout.splitlines()
    assert after(words, "--rdzv-endpoint") == [f"node7:{port}"]


def test_a_job_has_all_memory_and_all_cores_of_its_nodes(programs):
    scripts = [*SLURM.glob("*.sbatch"), ROOT / "examples" / "paper" / "job.sbatch"]
    assert len(scripts) == 3
    for script in scripts:
        assert "\n#SBATCH --exclusive\n#SBATCH --mem=0\n" in script.read_text(), script
    words = preflight(programs, OUT="/ckpt").stdout.splitlines()
    assert "--cpu-bind=none" in words[: words.index("bash")]


@pytest.mark.parametrize(
    "script", [*SLURM.glob("*.sbatch"), ROOT / "examples" / "paper" / "job.sbatch"]
)
def test_a_job_submitted_from_elsewhere_says_where_to_submit_it(programs, script, tmp_path):
    result = subprocess.run(
        ["bash", str(script), "examples/paper/base_lm.sh"],
        env={"PATH": programs, "OUT": "/ckpt"} | JOB | {"SLURM_SUBMIT_DIR": str(tmp_path)},
        **{"cwd": "/", "text": True, "capture_output": True},
    )
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == (
        f"{script.name}: error: submit from the root of the checkout, found no examples/slurm/job.sh in "
        f"{tmp_path}\n"
    )


def test_nodes_differ_in_their_logs_address_and_who_keeps_the_rendezvous(tmp_path):
    recorder = ("x", "--flight-recorder-dump-path", "/traces/rank_")
    nodes = (("node7", "true", ()), ("node8", "false", recorder))
    for number, (node, host, flags) in enumerate(nodes):
        variables = {"SLURM_NODEID": str(number), "SLURMD_NODENAME": node, "OUT": str(tmp_path)}
        result = subprocess.run(
            ["bash", SLURM / "node.sh", "bash", "-c", "kill -USR2 $$; env", *flags],
            **{
                "env": os.environ | JOB | variables,
                "text": True,
                "capture_output": True,
                "check": True,
            },
        )
        found = dict(
            line.split("=", 1)
            for line in result.stdout.splitlines()
            if line.startswith(("PET_", "TORCH_"))
        )
        assert found["PET_LOG_DIR"] == str(tmp_path / "logs" / "30123.0" / node)
        assert Path(found["PET_LOG_DIR"]).is_dir()
        assert found["PET_LOCAL_ADDR"] == node
        assert found["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"] == "280"
        # Megatron would take no flag beside it.
        traces = None if flags else f"{found['PET_LOG_DIR']}/nccl_trace_rank_"
        assert found.get("TORCH_FR_DUMP_TEMP_FILE") == traces
        assert found["PET_RDZV_CONF"].startswith(f"is_host={host},join_timeout=")


def test_torchrun_reads_its_flags_from_the_variables_of_a_node(monkeypatch):
    from torch.distributed.run import parse_args

    names = ("LOG_DIR", "LOCAL_ADDR", "RDZV_CONF")
    for name in names:
        monkeypatch.setenv(f"PET_{name}", f"of {name}")
    args = parse_args(["x.py"])
    assert [getattr(args, name.lower()) for name in names] == [f"of {name}" for name in names]


def test_torchrun_knows_every_flag_and_reads_how_long_a_save_may_take(programs, monkeypatch):
    from torch.distributed.launcher.api import LaunchConfig
    from torch.distributed.run import config_from_args, parse_args

    words = preflight(programs, OUT="/ckpt").stdout.splitlines()
    words = words[words.index("torch.distributed.run") + 1 :]
    # Torch 2.11 ends at flags that came later.
    assert "--shutdown-timeout" not in words
    args = parse_args(words)
    if not hasattr(LaunchConfig, "shutdown_timeout"):
        pytest.skip("this torch waits for 30 s")
    monkeypatch.setenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "280")
    assert config_from_args(args)[0].shutdown_timeout == 280


@pytest.mark.parametrize(
    ("ending", "requeued"),
    [
        ("exit 0", False),
        ("exit 1", False),  # nothing was saved
        ("echo 4 >$OUT/latest_checkpointed_iteration.txt; exit 1", True),
        ("echo 4 >$OUT/latest_checkpointed_iteration.txt; exit 0", False),
        ("touch $OUT/preempted; exit 1", True),
        # The checkpoint is another job's.
        (
            "echo 4 >$OUT/latest_checkpointed_iteration.txt; touch $OUT/ended_for_another_run.30123; exit 1",
            False,
        ),
        # The time limit, in time for a save and too late for one.
        (
            "kill -USR1 $JOB; sleep 1; echo 4 >$OUT/latest_checkpointed_iteration.txt; exit 1",
            True,
        ),
        ("kill -USR1 $JOB; sleep 1; exit 1", False),
        (
            "kill -USR1 $JOB; sleep 0.3; kill -TERM $JOB; sleep 1; exit 1",
            False,
        ),  # cancelled in the meantime
        ("echo 4 >$OUT/latest_checkpointed_iteration.txt; kill -TERM $JOB; exit 1", False),
    ],
)
def test_a_job_is_requeued_when_it_has_more_to_do(tmp_path, ending, requeued):
    called = tmp_path / "called"
    for program in ("scontrol", "scancel"):
        executable(tmp_path / program, f'echo {program} "$@" >>{called}')
    with (tmp_path / "scontrol").open("a") as script:
        script.write('test -e "$OUT/preempted" && time=2026-11-21T15:22:48 || time=None\n')
        script.write('echo "   PreemptEligibleTime=2026-11-21T15:22:47 PreemptTime=$time"\n')
    executable(tmp_path / "recipe.sh", ending)
    result = subprocess.run(
        [
            "bash",
            "-c",
            'export JOB=$$; set -eu; source examples/slurm/job.sh; run_recipe "$OUT/recipe.sh"',
        ],
        env=JOB | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "OUT": str(tmp_path)},
        **{"cwd": ROOT, "text": True, "capture_output": True},
    )
    assert result.returncode == int(ending[-1]), result.stderr
    calls = called.read_text().splitlines() if called.exists() else []
    assert ("scontrol requeue 30123" in calls) == requeued
    assert ("scancel --signal=TERM 30123" in calls) == ("USR1" in ending)


@pytest.fixture
def sweep(tmp_path) -> list[str]:
    """The README's two blocks about a sweep, in a world of stand-ins."""
    section = (SLURM / "README.md").read_text().partition("## Weights and seeds")[2]
    blocks = re.findall(r"^```\n(.*?)^```", section, re.DOTALL | re.MULTILINE)[:2]
    build(tmp_path)
    for name in ("web_text_document", "code_text_document", "qa_text_document", "tok.model"):
        for suffix in (".idx", ".bin", ""):
            (tmp_path / f"{name}{suffix}").touch()
    return [
        block.replace("/data/", f"{tmp_path}/").replace("/ckpt/", f"{tmp_path}/")
        for block in blocks
    ]


def bash(script: str, **variables: str) -> str:
    result = subprocess.run(
        ["bash", "-euc", script],
        **{"cwd": ROOT, "env": variables, "text": True, "capture_output": True},
    )
    assert (result.returncode, result.stderr) == (0, "")
    return result.stdout


def test_the_readme_s_sweep_starts_a_run_for_each_weight_and_seed(sweep, tmp_path):
    # Starts the recipe without Slurm, as a dry run without a plan.
    script = 'while case $1 in *.sbatch) false ;; esac; do shift; done; exec bash "$@"'
    executable(tmp_path / "sbatch", script)
    variables = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_SUBMIT_DIR": str(ROOT)}
    out = bash(sweep[0], **variables, DRY_RUN="1", PYTHON=str(tmp_path / "echo-words"))
    # The stand-in for Python prints the words of the plan again, one a line.
    runs = [line.split() for line in out.splitlines() if " --forget-data-path " in line]
    # The recipe gives the paper's weight, and what is behind it wins.
    found = {
        (words[-3], after(words, "--seed")[0], after(words, "--save")[0])
        for words in runs
        if words[-4:-3] + words[-2:] == ["--forget-weight", "--save-retain-interval", "2000"]
    }
    assert len(runs) == 9
    assert found == {
        (weight, seed, f"{tmp_path}/sweep/w{weight}/seed-{seed}")
        for weight in ("0.003", "0.01", "0.03")
        for seed in "123"
    }
    assert {after(words, "--data-cache-path")[0] for words in runs} == {f"{tmp_path}/data-cache"}


def test_the_readme_s_scores_of_a_sweep_are_joined(sweep, tmp_path):
    content = '{"results": {"mmlu": {"acc,none": 0.4}}, "settings": {"name": "%s"}}'
    write = f'printf \'{content}\' "$name" >"$output"'
    read = "while [ $# -gt 1 ]; do case $1 in --name) name=$2 ;; --output) output=$2 ;; esac; shift; done"
    real = f'*seeds.py) shift; exec {sys.executable} {ROOT}/examples/paper/seeds.py "$@" ;;'
    executable(tmp_path / "python", f"case $1 in {real} esac; {read}; {write}")
    path = f"{tmp_path}:{os.environ['PATH']}"
    out = bash(f"cd {tmp_path}; {sweep[1]}", PATH=path)
    assert "| unlearn-w0.03 | 40.0 ± 0.0 |" in out
    assert "| unlearn-w0.003 - synth, MMLU | +0.0 | +0.0 | +0.0 |" in out


def test_the_readme_s_chat_job_waits_for_the_model_that_it_tunes(tmp_path):
    text = (ROOT / "examples" / "paper" / "README.md").read_text()
    [block] = re.findall(r"^job=\$\(.*?(?=^# )", text, re.DOTALL | re.MULTILINE)
    executable(
        tmp_path / "sbatch", f'echo "$OUT $MODEL $SYNTH_LM $*" >>{tmp_path}/jobs\necho 30123'
    )
    bash(block, PATH=f"{tmp_path}:{os.environ['PATH']}")
    unlearn, chat = (tmp_path / "jobs").read_text().splitlines()
    assert unlearn.startswith("ckpt/unlearn  ckpt/start --parsable ")
    assert chat.startswith("ckpt/chat ckpt/unlearn  --dependency=afterok:30123 ")


def test_shellcheck_finds_nothing():
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed")
    scripts = sorted([*SLURM.glob("*.sh"), *SLURM.glob("*.sbatch")])
    result = subprocess.run(
        ["shellcheck", *map(str, scripts)], cwd=SLURM, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout
